"""Text from a model: filters of the next token's distribution, and batched generation with a KV cache."""

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
    """How the next token is chosen. The filters apply in this order."""

    temperature: float = 1.0
    """Divides the logits; 0: always the most probable token."""
    top_k: int | None = None
    """Only the k most probable tokens; None: all."""
    top_p: float = 1.0
    """Only the smallest set of most probable tokens with at least this probability together (nucleus)."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"temperature={self.temperature} is negative; allowed: 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} leaves no token; allowed: 1 or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} is outside 0 (excluded) to 1")


@dataclass(frozen=True)
class Prompt:
    """Tokens to continue, and the seed of this continuation."""

    tokens: list[int]
    seed: int


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt."""

    tokens: list[int]
    """Without the prompt and without eos."""
    finished: bool
    """Whether eos ended it, not the limit of tokens."""


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits [..., V] with all but the k largest of each row at -inf; of equal ones, some are kept."""
    k = min(k, logits.shape[-1])
    values, tokens = logits.topk(k, dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, tokens, values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Logits [..., V] with all at -inf but the smallest set of largest ones whose probability is at least p."""
    if p >= 1:
        return logits
    values, tokens = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = values.double().softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    values = values.masked_fill(before >= p, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, tokens, values)


def token_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution [..., V] in fp64 that the next token is drawn from."""
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    logits = logits.double() / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    return keep_top_p(logits, sampling.top_p).softmax(-1)


def sample(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """One token per row of logits [B, V], each row from its own generator: int64 [B], on the CPU."""
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
    """Continue all prompts in one batch until eos or `max_new_tokens`.

    A prompt's continuation depends on its tokens and its seed, not on the batch it is in. Tokens from
    `vocab_size` on, with which the embedding is filled up, are never chosen. `progress` gets the number of
    rows that a step went on with.
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
    last = lengths - 1  # which of the tokens just read is the last of its row
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
    """Seed of the `number`-th continuation of a prompt: the same whatever else is generated with it."""
    digest = hashlib.sha256(f"{seed}:{number}:{list(tokens)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
