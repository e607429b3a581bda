"""Ulysses sequence parallelism (Jacobs et al., 2023): the ranks of a group share each sequence.

Every rank of a group reads the same sequences and holds T / P of their tokens. All of the model works on tokens one
by one, but for attention, which trades tokens for heads: each rank then has all T tokens of H / P heads, attends over
them as ever, and trades back. Weights are those of data parallelism: the gradient is the sum over the slices of all
ranks, so DeepSpeed need not know.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.batch import Batch
from pretrain.distributed import World


class SequenceGroup:
    """The P ranks that share sequences with this one: neighbors, so that they are on one node."""

    def __init__(self, world: World) -> None:
        """All ranks of the world call this together; each group gets a process group of its own."""
        self.size = world.sequence_ranks
        self.rank = world.rank % self.size
        for first in range(0, world.size, self.size):
            group = dist.new_group(list(range(first, first + self.size)))
            if first <= world.rank < first + self.size:
                self._group = group

    def keep_out_of_graphs(self) -> None:
        """For a model whose parts are compiled: an exchange is not a part of any graph."""
        self.to_heads = torch.compiler.disable(self.to_heads)  # type: ignore[method-assign]
        self.to_tokens = torch.compiler.disable(self.to_tokens)  # type: ignore[method-assign]

    def own_part(self, batch: Batch) -> Batch:
        """Tokens, labels and positions [B, T / P] of this rank; document ids stay whole, for attention sees all."""
        length = batch.tokens.shape[1] // self.size
        own = slice(self.rank * length, (self.rank + 1) * length)
        return batch._replace(
            tokens=batch.tokens[:, own], labels=batch.labels[:, own], positions=batch.positions[:, own]
        )

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, heads, T / P, K] of all heads become [B, heads / P, T, K] of all tokens; in one exchange.

        A group's query heads and the key heads that serve them go to the same rank.
        """
        parts = [x.unflatten(1, (self.size, -1)) for x in (q, k, v)]  # [B, P, heads / P, T / P, K]
        widths = [part.shape[2] for part in parts]
        traded = self._trade(
            torch.cat(parts, dim=2).transpose(0, 1)
        )  # [P, B, heads / P of all three, T / P, K]
        return traded.permute(1, 2, 0, 3, 4).flatten(2, 3).split(widths, dim=1)  # type: ignore[return-value]

    def to_tokens(self, y: Tensor) -> Tensor:
        """The way back: [B, H / P, T, K] of all tokens become [B, H, T / P, K] of all heads."""
        parts = y.unflatten(2, (self.size, -1))  # [B, H / P, P, T / P, K]
        return self._trade(parts.permute(2, 0, 1, 3, 4)).transpose(0, 1).flatten(1, 2)

    def _trade(self, x: Tensor) -> Tensor:
        """Of x [P, ...], the parts [p] of rank r and [r] of rank p change places."""
        return _AllToAll.apply(x, self._group)


class _AllToAll(torch.autograd.Function):
    """Its own transpose: the gradient takes the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _all_to_all(gradient, ctx.group), None


def _all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.contiguous()
    result = torch.empty_like(x)
    dist.all_to_all_single(result, x, group=group)
    return result
