"""How the next token is chosen from a model's logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. The filters apply in the order of the fields."""

    repetition_penalty: float = 1.0
    """Number by which the positive logits of tokens that the text already has are divided, and the negative ones
    multiplied; 1 changes nothing (Keskar et al., 2019)."""
    temperature: float = 1.0
    """Number by which the logits are divided; 0 always chooses the most probable token."""
    top_k: int | None = None
    """Sample only from this many of the most probable tokens; None samples from all."""
    top_p: float = 1.0
    """Sample only from the smallest set of most probable tokens whose total probability is at least this (nucleus
    sampling, Holtzman et al., 2019)."""
    min_p: float = 0.0
    """Sample only from tokens that are at least this many times as probable as the most probable one (Nguyen et al.,
    2024)."""

    def __post_init__(self) -> None:
        if not 0 < self.repetition_penalty < float("inf"):
            raise ConfigError(f"repetition_penalty={self.repetition_penalty} must be a number greater than 0")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature} must be a number of 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} leaves no token; allowed: 1 or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be greater than 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p={self.min_p} must be at least 0 and at most 1")


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [..., V] with those of the tokens in `seen`, bool [..., V], made less probable."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits [..., V] with all but the k largest of each row set to -inf. Ties are broken arbitrarily."""
    k = min(k, logits.shape[-1])
    values, tokens = logits.topk(k, dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, tokens, values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Logits [..., V] with all set to -inf except the fewest largest ones whose total probability is at least p."""
    if p >= 1:
        return logits
    values, tokens = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = values.double().softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    values = values.masked_fill(before >= p, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, tokens, values)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Logits [..., V] with those set to -inf whose probability is less than p times the largest one."""
    probabilities = logits.double().softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -torch.inf)


def token_probabilities(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """The distribution from which the next token is drawn: fp64 [..., V], from logits [..., V].

    `seen`, bool [..., V], marks the tokens that the text already has; only the repetition penalty uses it.
    """
    if seen is not None and sampling.repetition_penalty != 1:
        logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    logits = logits.double() / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        logits = keep_min_p(logits, sampling.min_p)
    return logits.softmax(-1)


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator, seen: Tensor | None = None) -> int:
    """Draw the next token from logits [V] on the CPU."""
    if sampling.temperature == 0:
        if seen is not None and sampling.repetition_penalty != 1:
            logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
        return int(logits.argmax())
    probabilities = token_probabilities(logits, sampling, seen)
    return int(torch.multinomial(probabilities, 1, generator=generator))
