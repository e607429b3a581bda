"""DeepSpeed-Ulysses sequence parallelism (Jacobs et al., 2023): the P ranks of a group share each sequence.

Every rank of a group reads the same sequences and holds T / P of their tokens. The whole model works on each token
separately, except for attention. There an all-to-all exchange gives each rank all T tokens of H / P heads; it computes
attention for these heads as usual, and a second exchange returns to T / P tokens of all heads. Weights are replicated
or partitioned as in data parallelism, and the gradient is the sum over the parts of all ranks, so the engine needs no
change.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.batch import Batch
from pretrain.distributed import World


class SequenceGroup:
    """The group of P ranks that share sequences. Their rank numbers are consecutive, so they are on one node."""

    def __init__(self, world: World) -> None:
        """Create a process group for each group of ranks. All ranks of the world must call this together."""
        self.size = world.sequence_ranks
        self.rank = world.rank % self.size
        for first in range(0, world.size, self.size):
            group = dist.new_group(list(range(first, first + self.size)))
            if first <= world.rank < first + self.size:
                self._group = group

    def keep_out_of_graphs(self) -> None:
        """Exclude the exchanges from the graphs of a compiled model."""
        self.to_heads = torch.compiler.disable(self.to_heads)  # type: ignore[method-assign]
        self.to_tokens = torch.compiler.disable(self.to_tokens)  # type: ignore[method-assign]

    def own_part(self, batch: Batch) -> Batch:
        """This rank's part of a batch: tokens, labels and positions [B, T / P].

        Document ids stay [B, T], because attention sees all tokens.
        """
        length = batch.tokens.shape[1] // self.size
        own = slice(self.rank * length, (self.rank + 1) * length)
        return batch._replace(
            tokens=batch.tokens[:, own], labels=batch.labels[:, own], positions=batch.positions[:, own]
        )

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Turn q, k and v from [B, heads, T / P, K] into [B, heads / P, T, K], in a single exchange.

        Query heads go to the same rank as the key heads that they attend with.
        """
        parts = [x.unflatten(1, (self.size, -1)) for x in (q, k, v)]  # [B, P, heads / P, T / P, K]
        widths = [part.shape[2] for part in parts]
        traded = self._trade(
            torch.cat(parts, dim=2).transpose(0, 1)
        )  # [P, B, heads / P of q, k and v together, T / P, K]
        return traded.permute(1, 2, 0, 3, 4).flatten(2, 3).split(widths, dim=1)  # type: ignore[return-value]

    def to_tokens(self, y: Tensor) -> Tensor:
        """Turn the result of attention from [B, H / P, T, K] back into [B, H, T / P, K]."""
        parts = y.unflatten(2, (self.size, -1))  # [B, H / P, P, T / P, K]
        return self._trade(parts.permute(2, 0, 1, 3, 4)).transpose(0, 1).flatten(1, 2)

    def _trade(self, x: Tensor) -> Tensor:
        """All-to-all exchange of x [P, ...]: part p of rank r swaps places with part r of rank p."""
        return _AllToAll.apply(x, self._group)


class _AllToAll(torch.autograd.Function):
    """An all-to-all exchange. It is its own transpose, so the backward pass makes the same exchange."""

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
