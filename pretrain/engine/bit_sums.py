"""Sums over the bits of a run's state, which show when faulty memory changes it.

The state must not change between two updates. Sums taken after each update and again before the next one show a
flipped bit, and copies of a parameter that every rank holds must have the same sum on all ranks. A flip in a gradient
or an activation does not show, because there is no second copy of it; the loss guard may still see its effect.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable

import torch

from pretrain.distributed import World, gather_objects
from pretrain.errors import RunError

REPLICA_MODULUS = 2**40
"""Bit sums are reduced to this modulus, so that their fp64 sum is exact for up to 8,192 ranks."""


def bit_sum(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Wrapping sum of contiguous tensors, read as 64-bit integers (8-bit ones at the ends); a scalar on their device.

    A single flipped bit always changes the sum.
    """
    total = torch.zeros((), dtype=torch.int64)
    for tensor in tensors:
        octets = tensor.detach().reshape(-1).view(torch.uint8)
        whole = octets.numel() // 8 * 8
        if octets.storage_offset() % 8:
            octets = octets.clone()
        parts = octets[:whole].view(torch.int64).sum()
        if whole < octets.numel():
            parts = parts + octets[whole:].sum(dtype=torch.int64)
        total = total.to(parts.device) + parts
    return total


class StateSums:
    """Bit sums of a rank's state.

    `partitioned` returns the tensors that only this rank holds, and `replicated` those that every rank holds.
    """

    def __init__(
        self, partitioned: Callable[[], list[torch.Tensor]], replicated: Callable[[], list[torch.Tensor]]
    ) -> None:
        self._partitioned, self._replicated = partitioned, replicated
        self._after: torch.Tensor | None = None
        self.replica = torch.zeros((), dtype=torch.int64)
        """Sum of the replicated tensors after the last update; the same on all ranks."""

    def remember(self) -> None:
        """Take the sums after an update. The state must not change until the next one."""
        self.replica = bit_sum(self._replicated())
        own = bit_sum(self._partitioned())
        self._after = own + self.replica.to(own.device)

    def forget(self) -> None:
        """Drop the sums, because the state is about to be replaced."""
        self._after = None

    def changed(self) -> torch.Tensor:
        """1 if anything has changed since `remember`, otherwise 0; a scalar on the device of the state."""
        if self._after is None:
            return torch.zeros((), dtype=torch.int64)
        now = bit_sum([*self._partitioned(), *self._replicated()])
        return (now.to(self._after.device) != self._after).to(torch.int64)


def check_bit_sums(
    *, changed: bool, replica: float, n_changed: float, replica_total: float, step: int, world: World
) -> None:
    """Raise RunError on all ranks if the memory of one has changed between two updates.

    `changed` says whether this rank's memory has changed, and `replica` is its sum modulo REPLICA_MODULUS. `n_changed`
    and `replica_total` are the sums of the two over all ranks.
    """
    if n_changed == 0 and replica_total == replica * world.size:
        return
    rows = gather_objects((changed, replica, os.uname().nodename), world)
    usual = statistics.mode(row[1] for row in rows)
    odd = [(rank, row) for rank, row in enumerate(rows) if row[0] or row[1] != usual]
    names = ", ".join(f"rank {rank} on {row[2]}" for rank, row in odd)
    what = "changed between two updates" if n_changed else "differ from the other ranks' copies"
    raise RunError(
        f"weights or optimizer state of {names} {what}, seen in step {step}: memory or a device is faulty; "
        "nothing of it is saved, start again without that host"
    )
