"""Two silent faults: memory that changes by itself, and a rank that is slow.

The state of a run must not change between two updates. Sums over its bits, taken after each update and again before the
next, show a flipped bit; copies of a parameter that every rank holds must have the same sum on all. What does not show:
a flip in a gradient or an activation, of which there is no second copy, unless the guard of the loss sees it.

A slow rank slows all alike, since they wait for each other. So when steps have become slow, and once near the start,
every rank computes for a moment by itself; who then does less than the others is named.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from pretrain.config import RunError
from pretrain.distributed import World, gather_objects

REPLICA_MODULUS = 2**40
"""Sums over ranks are taken in fp64, which holds 8,192 of these exactly."""
WINDOW_STEPS = 10
SLOW_FACTOR = 1.5
"""Steps are slow when the median of a window is so many times the fastest window's."""
PAUSE_WINDOWS = 10
"""Between two comparisons while steps stay slow."""
PROBE_S = 0.2
STRAGGLER_FRAC = 2 / 3
"""A rank that computes below this share of the upper median of all is named."""


def bit_sum(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Sum of the bits of contiguous tensors, read as integers of 64 (the ends: 8) bits and wrapped around; on a device.

    One flipped bit always changes it.
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
    """Bit sums of a rank's state. `partitioned`: what this rank alone holds; `replicated`: what every rank holds."""

    def __init__(
        self, partitioned: Callable[[], list[torch.Tensor]], replicated: Callable[[], list[torch.Tensor]]
    ) -> None:
        self._partitioned, self._replicated = partitioned, replicated
        self._after: torch.Tensor | None = None
        self.replica = torch.zeros((), dtype=torch.int64)
        """Sum of the replicated tensors after the last update; the same on all ranks."""

    def remember(self) -> None:
        """An update is done: from now on nothing may change."""
        self.replica = bit_sum(self._replicated())
        own = bit_sum(self._partitioned())
        self._after = own + self.replica.to(own.device)

    def forget(self) -> None:
        """The state is about to be replaced."""
        self._after = None

    def changed(self) -> torch.Tensor:
        """Whether anything has changed since `remember`: 0 or 1, on a device."""
        if self._after is None:
            return torch.zeros((), dtype=torch.int64)
        now = bit_sum([*self._partitioned(), *self._replicated()])
        return (now.to(self._after.device) != self._after).to(torch.int64)


def check_memory(
    *, changed: bool, replica: float, n_changed: float, replica_total: float, step: int, world: World
) -> None:
    """Raise RunError on all ranks where the memory of one is not what it was. The totals are sums over the ranks.

    `replica`: this rank's sum modulo REPLICA_MODULUS.
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


@dataclass(frozen=True)
class Straggler:
    """A rank that holds up the others."""

    rank: int
    host: str
    cause: str
    """compute, or data: the wait for the loader."""
    share: float
    """Of compute: its speed over the upper median's. Of data: its wait over the time of the steps."""


class Pace:
    """Notices that steps have become slow (rank 0), and finds out which rank it is (all ranks)."""

    def __init__(self, *, watch: bool) -> None:
        self._watch = watch
        self._times_s: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._waits_s: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._fastest_s = float("inf")
        self._steps = 0
        self._compared = False
        self._pause_until = 0
        self.slow = False
        """Whether the steps were slow when this was last looked at."""

    def note(self, step_time_s: float, data_wait_s: float) -> None:
        """One more step of this rank."""
        self._times_s.append(step_time_s)
        self._waits_s.append(data_wait_s)
        self._steps += 1

    def wants_probe(self) -> bool:
        """Rank 0: whether the ranks should be compared now: after the first window, and when steps are slow."""
        if not self._watch or len(self._times_s) < WINDOW_STEPS:
            return False
        median_s = statistics.median(self._times_s)
        self._fastest_s = min(self._fastest_s, median_s)
        self.slow = median_s > SLOW_FACTOR * self._fastest_s
        if not self._compared:
            self._compared = True
            return True
        if not self.slow or self._steps < self._pause_until:
            return False
        self._pause_until = self._steps + PAUSE_WINDOWS * WINDOW_STEPS
        return True

    def find_stragglers(self, world: World) -> list[Straggler]:
        """All ranks together: who computes slowly, or waits long for data. Takes PROBE_S."""
        speed = _speed(world.device)
        share = sum(self._waits_s) / max(sum(self._times_s), 1e-9)
        rows = gather_objects((speed, share, os.uname().nodename), world)
        usual = statistics.median_high(row[0] for row in rows)
        found = []
        for rank, (speed, share, host) in enumerate(rows):
            if speed < STRAGGLER_FRAC * usual:
                found.append(Straggler(rank, host, "compute", speed / usual))
            elif share > 0.5 and share > 2 * statistics.median_low(row[1] for row in rows):
                found.append(Straggler(rank, host, "data", share))
        return found


def _speed(device: torch.device) -> float:
    """Small matrix products per second, of this rank alone."""
    width = 4096 if device.type == "cuda" else 256
    matrix = torch.ones(width, width, device=device, dtype=torch.bfloat16 if device.type == "cuda" else None)
    n_done, started = 0, time.monotonic()
    while (passed_s := time.monotonic() - started) < PROBE_S:
        torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        n_done += 1
    return n_done / passed_s
