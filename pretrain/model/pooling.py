"""Means over the tokens of each document, for a classifier."""

from __future__ import annotations

import torch
from torch import Tensor


def document_means(hidden: Tensor, positions: Tensor | None, is_last: Tensor) -> Tensor:
    """The mean of the states [B, T, D] of each document, at all of its positions: [B, T, D] in the type of `hidden`.

    A document begins where `positions` [B, T] are 0 (at the start of each row without them) and ends where `is_last`
    [B, T]; what follows in the row until the next one, such as a label or padding, has a mean of its own. The sums are
    in fp32, and each is over the tokens of one document in their order, so it does not depend on the others.
    """
    n_rows, length = is_last.shape
    begins = torch.zeros_like(is_last) if positions is None else positions == 0
    begins[:, 0] = True
    begins[:, 1:] |= is_last[:, :-1]
    flat = begins.flatten()
    starts = flat.nonzero()[:, 0]
    lengths = torch.diff(starts, append=starts.new_tensor([n_rows * length]))
    means = torch.segment_reduce(hidden.flatten(0, 1).float(), "mean", lengths=lengths, axis=0)
    return means[flat.cumsum(0) - 1].view_as(hidden).to(hidden.dtype)
