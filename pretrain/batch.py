"""What the data gives to the model: a batch of sequences. Imports no torch, so that loader workers can use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.data.state import Substitution

IGNORED_LABEL = -100
"""Label of a position at which nothing is predicted."""


class Counts(NamedTuple):
    """How documents fell into sequences."""

    pieces: int = 0
    """Documents, or parts of them, counted once per sequence."""
    cut: int = 0
    """Those that are not a whole document."""
    padding: int = 0
    """Tokens."""


class Batch(NamedTuple):
    """B sequences of T tokens; every tensor is int64 [B, T]."""

    tokens: Tensor
    labels: Tensor
    """The next token; IGNORED_LABEL at the end of a chunk, at the end of a document when masking, in padding, and
    where the corpus has a loss mask and the next token is no target."""
    positions: Tensor
    """Position within the visible piece of the document (when masking), else within the sequence."""
    document_ids: Tensor
    """Pieces of documents in the sequence, counted from 0, padding being one of its own; all 0 without masking."""
    samples: NDArray[np.int64]
    """Global sample indices, [B]."""
    counts: Counts = Counts()
    """How documents fell into these sequences."""
    substitutions: Sequence[Substitution] = ()
    """Chunks that were found bad while these were read."""
