"""Continues a batch of prompts, one token per step, with a KV cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from pretrain.generation.sampling import Sampling, sample
from pretrain.model.decoder import Decoder, KVCache


class Ending(StrEnum):
    """Why a continuation ended."""

    STOP = "stop"
    """The model ended the text itself, or wrote one of the texts to stop at."""
    LENGTH = "length"
    """The limit on the number of tokens was reached."""
    CANCELLED = "cancelled"
    """Nobody wants the rest."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Tokens to continue, and how."""

    tokens: Sequence[int]
    """At least one token, such as bos."""
    max_new_tokens: int
    sampling: Sampling
    seed: int
    end_ids: Collection[int]
    """Tokens that end the text, such as eos. The token itself is not part of the continuation."""


class Continuation:
    """What a model has written after one prompt so far."""

    def __init__(self, prompt: Prompt, vocab_size: int) -> None:
        self.prompt = prompt
        self.tokens: list[int] = []
        """The generated tokens, without the prompt and without the token that ended the text."""
        self.ending: Ending | None = None
        """None while the text goes on."""
        self._generator = torch.Generator().manual_seed(prompt.seed)
        self._seen: torch.Tensor | None = None
        if prompt.sampling.repetition_penalty != 1:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool)
            self._seen[[token for token in prompt.tokens if token < vocab_size]] = True

    def advance(self, logits: torch.Tensor) -> int:
        """Choose the next token from logits [V]. Returns it, even where it ends the text."""
        token = sample(logits, self.prompt.sampling, self._generator, self._seen)
        if token in self.prompt.end_ids:
            self.ending = Ending.STOP
            return token
        self.tokens.append(token)
        if self._seen is not None:
            self._seen[token] = True
        if len(self.tokens) == self.prompt.max_new_tokens:
            self.ending = Ending.LENGTH
        return token


class Batch:
    """The continuations of several prompts.

    What a continuation says depends on its own prompt alone, not on the rest of the batch. Ids from `vocab_size` on,
    which only pad the embedding, are never chosen.
    """

    def __init__(self, model: Decoder, prompts: Sequence[Prompt], vocab_size: int) -> None:
        self.rows = [Continuation(prompt, vocab_size) for prompt in prompts]
        self._model, self._vocab_size = model, vocab_size
        self._device = model.embed.weight.device
        lengths = [len(prompt.tokens) for prompt in prompts]
        self._tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)  # padded on the right
        for row, prompt in enumerate(prompts):
            self._tokens[row, : lengths[row]] = torch.tensor(prompt.tokens)
        self._positions = torch.arange(max(lengths)).expand_as(self._tokens)
        self._lengths = torch.tensor(lengths)
        self._last = self._lengths - 1  # per row, the index of its last token among those that are read next
        # Rows that have ended go on in the cache until the batch ends, though nobody looks at them.
        n_slots = max(lengths) + max(prompt.max_new_tokens for prompt in prompts)
        dtype = model.embed.weight.dtype
        self._cache = KVCache(model.config, len(prompts), n_slots, self._device, dtype)

    @property
    def open_rows(self) -> list[int]:
        """Rows whose text goes on."""
        return [number for number, row in enumerate(self.rows) if row.ending is None]

    @torch.no_grad()
    def step(self) -> list[int]:
        """Give each open row its next token. Returns the rows that were open."""
        rows = self.open_rows
        hidden = self._model.hidden(
            self._tokens.to(self._device), self._positions.to(self._device), cache=self._cache
        )
        (logits,) = self._model.head(hidden[torch.arange(len(self.rows)), self._last])
        logits = logits[:, : self._vocab_size].float().cpu()
        chosen = torch.zeros(len(self.rows), dtype=torch.int64)
        for row in rows:
            chosen[row] = self.rows[row].advance(logits[row])
        self._tokens, self._positions = chosen[:, None], self._lengths[:, None]
        self._last, self._lengths = torch.zeros_like(self._last), self._lengths + 1
        return rows
