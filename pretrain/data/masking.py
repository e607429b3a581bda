"""Masked language modeling: which tokens of a sample are hidden, and by what.

This is a pure function of (seed, sample, position). No random state is kept: each decision is a hash, as in the order
of samples. So the masks of a sample are the same on any number of ranks and workers, in any micro batch, and after a
resume. A sequence that is read again in a later epoch is another sample, and so gets other masks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from pretrain.batch import IGNORED_LABEL
from pretrain.config import MlmConfig
from pretrain.data.permutation import Ints, Keys, key_of
from pretrain.errors import ConfigError

if TYPE_CHECKING:  # loader workers, which import this file, open no tokenizer
    from pretrain.corpus.tokenizer import Tokenizer

_CHOICE, _FATE, _TOKEN = 0x6D6C6D01, 0x6D6C6D02, 0x6D6C6D03  # what a hash decides: part of its key
_HELDOUT_SEED = 0


@dataclass(frozen=True)
class Masking:
    """What hides tokens, for all samples of a run."""

    config: MlmConfig
    seed: int
    mask_id: int
    ordinary_ids: Ints
    """The ids that stand for text, ascending. Only these are chosen, and random tokens are drawn from them."""

    @classmethod
    def of(cls, config: MlmConfig, seed: int, tokenizer: Tokenizer) -> Masking:
        """The masking of a run. Raises ConfigError where the tokenizer has no mask token."""
        if tokenizer.mask_id is None:
            remedy = (
                "prepare the corpus again, since tokenizers that this version trains have one"
                if tokenizer.is_sentencepiece
                else "prepare the corpus again with tokenizer.mask_token=NAME, an entry that no text uses"
            )
            raise ConfigError(
                f"objective=mlm needs a mask token, and the tokenizer {tokenizer.path} has none; {remedy}"
            )
        return cls(config, seed, tokenizer.mask_id, tokenizer.ordinary_ids())

    def for_heldout(self) -> Masking:
        """The masking of held-out text. It does not depend on the run's seed, so that runs can be compared."""
        return replace(self, seed=_HELDOUT_SEED)

    def apply(self, tokens: NDArray[Any], labels: NDArray[Any], samples: Ints) -> None:
        """Hide tokens of sequences [B, T] in place.

        `labels` are the tokens that may be chosen, and IGNORED_LABEL elsewhere; afterward only chosen ones are left.
        Special tokens are never chosen.
        """
        rows, positions = (index.ravel() for index in np.indices(tokens.shape))
        numbers = samples[rows]
        flat_tokens, flat_labels = tokens.reshape(-1), labels.reshape(-1)
        allowed = (flat_labels != IGNORED_LABEL) & self._is_ordinary(flat_tokens)
        drawn = _uniform(key_of(self.seed, _CHOICE, numbers, positions))
        chosen = np.flatnonzero(allowed & (drawn < self.config.fraction))
        numbers, positions = numbers[chosen], positions[chosen]
        fate = _uniform(key_of(self.seed, _FATE, numbers, positions))
        number = key_of(self.seed, _TOKEN, numbers, positions) % np.uint64(len(self.ordinary_ids))
        becomes_random = fate < self.config.mask_fraction + self.config.random_fraction
        hidden = np.where(becomes_random, self.ordinary_ids[number.astype(np.int64)], flat_tokens[chosen])
        hidden = np.where(fate < self.config.mask_fraction, self.mask_id, hidden)
        kept = flat_labels[chosen]
        labels[:] = IGNORED_LABEL
        labels.reshape(-1)[chosen] = kept
        tokens.reshape(-1)[chosen] = hidden

    def hidden_document(
        self, tokens: NDArray[np.int64], labels: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """A whole document with tokens hidden, and the labels of these. `labels` are as in `apply`.

        The document's own tokens decide which of them are hidden, so it gets the same masks wherever it stands.
        """
        number = np.array([xxhash.xxh3_64_intdigest(tokens.tobytes()) >> 1], np.int64)
        tokens, labels = tokens[None].copy(), labels[None].copy()
        self.apply(tokens, labels, number)
        return tokens[0], labels[0]

    def _is_ordinary(self, tokens: NDArray[Any]) -> NDArray[np.bool_]:
        at = np.searchsorted(self.ordinary_ids, tokens)
        at[at == len(self.ordinary_ids)] = 0
        return self.ordinary_ids[at] == tokens


def _uniform(keys: Keys) -> NDArray[np.float64]:
    """Numbers in [0, 1) from hashes, the same on every machine."""
    return (keys >> np.uint64(11)).astype(np.float64) * 2.0**-53
