"""Labeled documents as tokens: bos, text, eos and then the number of the document's class, which alone is predicted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pretrain.corpus.shards import Corpus, documents_of


class LabeledDocument(NamedTuple):
    """A document and its class."""

    tokens: np.ndarray
    """Its tokens with bos and eos."""
    label: int
    """The number of its class."""
    text_bytes: int
    """Size of its text in UTF-8, in bytes."""


def beginning(tokens: np.ndarray, max_tokens: int, eos_id: int) -> np.ndarray:
    """A document, which ends with eos, shortened so that it and the number of its class have `max_tokens` at most.

    Its start is kept, and eos still ends it.
    """
    if len(tokens) < max_tokens:
        return tokens
    kept = tokens[: max_tokens - 1].copy()
    kept[-1] = eos_id
    return kept


def labeled_documents(corpus: Corpus) -> Iterator[LabeledDocument]:
    """The documents of a labeled corpus. Raises CorruptShardError."""
    for found in documents_of(corpus):
        yield LabeledDocument(found.tokens[:-1], int(found.tokens[-1]), found.text_bytes)
