"""Which classes the documents of a labeled corpus have, and how a document becomes tokens with its class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_tools.config import PrepareConfig
from pretrain.config.model import MAX_CLASSES
from pretrain.corpus.labels import beginning
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.errors import ConfigError


def classes_of(config: PrepareConfig, labels: Sequence[str], is_heldout: np.ndarray) -> list[str]:
    """The classes in the order of their numbers: those that are given, or all labels, sorted.

    Raises ConfigError where there are too few or too many, or only held-out documents have one.
    """
    if config.labels.classes:
        return list(config.labels.classes)
    found = set(labels)
    if len(found) > MAX_CLASSES:
        raise ConfigError(
            f"label_field={config.label_field} has {len(found):,} different values, and a classifier has at most "
            f"{MAX_CLASSES:,} classes; name the field that holds the class"
        )
    if len(found) < 2:
        raise ConfigError(
            f"label_field={config.label_field} is {labels[0]!r} in all documents, and a classifier needs two classes"
        )
    learned = {label for label, out in zip(labels, is_heldout.tolist(), strict=True) if not out}
    for label in sorted(found - learned):
        raise ConfigError(
            f"the label {label!r} is on held-out documents only, so it cannot be learned; lower heldout_frac, or give "
            "more documents of it"
        )
    return sorted(found, key=lambda label: (int(label), "") if label.isdecimal() else (0, label))


class EncodedLabeled(NamedTuple):
    """Labeled documents as tokens: bos, text, eos, and the number of the class, which alone is to be predicted."""

    arrays: dict[str, np.ndarray]
    """The arrays of a tokenized part."""
    text_bytes: np.ndarray
    """int64 [documents]: UTF-8 bytes of the part of each text that became tokens."""
    n_cut: int
    """Number of documents whose end was left out."""


def encode_labeled(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    text_bytes: np.ndarray,
    numbers: Sequence[int],
    max_tokens: int,
) -> EncodedLabeled:
    """Encode documents with the numbers of their classes, in at most `max_tokens` tokens each."""
    encoded = tokenizer.encode_documents(texts)
    wholes = np.split(encoded.tokens, encoded.starts[1:-1])
    kept = [beginning(whole, max_tokens, tokenizer.eos_id) for whole in wholes]
    text_bytes = text_bytes.astype(np.int64)
    n_cut = 0
    for row, (whole, part) in enumerate(zip(wholes, kept, strict=True)):
        if len(part) < len(whole):
            text_bytes[row] = len(tokenizer.decode(part.tolist()).encode())
            n_cut += 1
    starts = np.cumsum([0, *(len(part) + 1 for part in kept)], dtype=np.int64)
    places = starts[1:] - 1
    tokens = np.empty(starts[-1], encoded.tokens.dtype)
    tokens[np.setdiff1d(np.arange(len(tokens)), places, assume_unique=True)] = np.concatenate(kept)
    tokens[places] = numbers
    arrays = {
        "tokens": tokens,
        "starts": starts,
        "targets": np.column_stack([places, places + 1]).flatten(),
        "target_starts": 2 * np.arange(len(texts) + 1),
        "target_bytes": np.zeros(len(texts), np.int64),
    }
    return EncodedLabeled(arrays, text_bytes, n_cut)
