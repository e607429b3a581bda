"""Finds ranks that slow down all the others.

Ranks wait for each other, so one slow rank slows down all of them equally, and step times do not show which one it is.
Therefore, once near the start and whenever steps have become slow, every rank computes on its own for COMPARISON_S. A
rank that computes much less than the others in this time is reported.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import deque
from dataclasses import dataclass

import torch

from pretrain.distributed import World, gather_objects

WINDOW_STEPS = 10
SLOW_FACTOR = 1.5
"""Steps are slow when the median of the last WINDOW_STEPS steps exceeds the smallest median so far by this factor."""
PAUSE_WINDOWS = 10
"""Number of windows between two comparisons while steps stay slow."""
COMPARISON_S = 0.2
"""Seconds for which each rank computes on its own in a comparison."""
STRAGGLER_FRAC = 2 / 3
"""A rank is a straggler if its speed is below this fraction of the upper median speed of all ranks."""


@dataclass(frozen=True)
class Straggler:
    """A rank that slows down the others."""

    rank: int
    """Number of the slow rank."""
    host: str
    """Name of its host."""
    cause: str
    """`compute`, or `data` if the rank waits for its loader."""
    share: float
    """For `compute`, its speed relative to the upper median; for `data`, the fraction of step time that it waits."""


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
        """Whether the steps were slow at the last call of `wants_comparison`."""

    def note(self, step_time_s: float, data_wait_s: float) -> None:
        """Add the times, in seconds, of one more step of this rank."""
        self._times_s.append(step_time_s)
        self._waits_s.append(data_wait_s)
        self._steps += 1

    def wants_comparison(self) -> bool:
        """Whether to compare the ranks now: after the first window, and when steps are slow. False unless `watch`."""
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
        """The ranks that compute slowly or wait long for data. All ranks call this together; it takes COMPARISON_S."""
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
    while (passed_s := time.monotonic() - started) < COMPARISON_S:
        torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        n_done += 1
    return n_done / passed_s
