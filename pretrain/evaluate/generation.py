"""Text generation: sampling filters for the next token, and batched generation with a KV cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.errors import ConfigError
from pretrain.model.decoder import Decoder, KVCache


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. The filters apply in the order of the fields."""

    temperature: float = 1.0
    """Number by which the logits are divided; 0 always chooses the most probable token."""
    top_k: int | None = None
    """Sample only from this many of the most probable tokens; None samples from all."""
    top_p: float = 1.0
    """Sample only from the smallest set of most probable tokens whose total probability is at least this (nucleus
    sampling, Holtzman et al., 2019)."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"temperature={self.temperature} is negative; allowed: 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} leaves no token; allowed: 1 or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be greater than 0 and at most 1")


@dataclass(frozen=True)
class Prompt:
    """The tokens to continue, and the seed for sampling the continuation."""

    tokens: list[int]
    seed: int


@dataclass(frozen=True)
class Continuation:
    """The text that a model generated after a prompt."""

    tokens: list[int]
    """The generated tokens, without the prompt and without eos."""
    finished: bool
    """Whether the text ended with eos; False where it reached the limit on the number of tokens."""


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


def token_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution from which the next token is drawn: fp64 [..., V], from logits [..., V]."""
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    logits = logits.double() / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    return keep_top_p(logits, sampling.top_p).softmax(-1)


def sample(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw one token per row of logits [B, V], each with the row's own generator. Returns int64 [B] on the CPU."""
    probabilities = token_probabilities(logits.float().cpu(), sampling)
    rows = zip(probabilities, generators, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in rows])


@torch.no_grad()
def generate(
    model: Decoder,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos_id: int,
    vocab_size: int,
    progress: Callable[[int], None] | None = None,
) -> list[Continuation]:
    """Continue all prompts in one batch, each until eos or `max_new_tokens` tokens.

    A prompt's continuation depends on its tokens and its seed, not on the rest of the batch. Ids from `vocab_size` on,
    which only pad the embedding, are never chosen. `progress` is called after each token with the number of unfinished
    rows.
    """
    device, dtype = model.embed.weight.device, model.embed.weight.dtype
    lengths = torch.tensor([len(prompt.tokens) for prompt in prompts])
    tokens = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)  # padded on the right
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt.tokens)] = torch.tensor(prompt.tokens)
    generators = [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]
    cache = KVCache(model.config, len(prompts), tokens.shape[1] + max_new_tokens, device, dtype)
    rows = torch.arange(len(prompts))
    written: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    last = lengths - 1  # per row, the index of its last token among those just read
    for _ in range(max_new_tokens):
        hidden = model.hidden(tokens.to(device), positions.to(device), cache=cache)
        (logits,) = model.head(hidden[rows, last])
        chosen = sample(logits[:, :vocab_size], sampling, generators)
        for row in list(open_rows):
            if int(chosen[row]) == eos_id:
                open_rows.remove(row)
            else:
                written[row].append(int(chosen[row]))
        if progress is not None:
            progress(len(open_rows))
        if not open_rows:
            break
        tokens, positions, last = chosen[:, None], lengths[:, None], torch.zeros_like(last)
        lengths = lengths + 1
    return [Continuation(tokens, row not in open_rows) for row, tokens in enumerate(written)]


def prompt_seed(seed: int, tokens: Sequence[int], number: int) -> int:
    """Seed of the `number`-th continuation of a prompt. It does not depend on the other prompts."""
    digest = hashlib.sha256(f"{seed}:{number}:{list(tokens)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
