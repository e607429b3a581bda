"""The batch of sequences that the data loader hands to the model. Imports no torch, so loader workers start faster."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

IGNORED_LABEL = -100
"""Label of a position that does not count in the loss; it is torch's default `ignore_index`."""


class Counts(NamedTuple):
    """How documents were split over sequences."""

    pieces: int = 0
    """Number of pieces: a document that lies in two sequences counts as two."""
    cut: int = 0
    """Number of pieces that are not a whole document."""
    padding: int = 0
    """Number of padding tokens, which are after the last document of a sequence."""


class Batch(NamedTuple):
    """B sequences of T tokens; every tensor is int64 [B, T]."""

    tokens: Tensor
    labels: Tensor
    """The next token of each position. It is IGNORED_LABEL at the end of a chunk, in padding, at the end of a document
    with document masking, and where the corpus has a loss mask that does not select the next token."""
    positions: Tensor
    """Position within the document piece with document masking, otherwise within the sequence."""
    document_ids: Tensor
    """Index of the document piece within the sequence, counted from 0. Padding is a piece of its own. Without document
    masking all are 0."""
    samples: NDArray[np.int64]
    """Global sample index of each sequence: int64 [B]."""
    counts: Counts = Counts()
    """How documents were split over these sequences."""
