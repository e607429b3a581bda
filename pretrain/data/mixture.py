"""Which source each position of a lane draws from, and how the rest of an epoch is dealt. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pretrain.data.permutation import Ints
from pretrain.errors import ConfigError

PERIOD = 1 << 16
"""P: number of positions after which a lane's mixture pattern repeats; shares are rounded to multiples of 1 / P."""


def quotas(weights: Sequence[float]) -> list[int]:
    """Places of each source in a period: proportional to the weights, at least 1 where a weight is positive."""
    total = math.fsum(weights)  # correctly rounded, so it is the same on every machine
    if not total > 0:
        raise ConfigError(
            f"the mixture's weights {list(weights)} have no positive sum; give at least one source one"
        )
    exact = [weight / total * PERIOD for weight in weights]
    counts = [max(1, math.floor(x)) if x > 0 else 0 for x in exact]
    left = PERIOD - sum(counts)
    for k in sorted(range(len(counts)), key=lambda k: counts[k] - exact[k])[: max(left, 0)]:
        counts[k] += 1
    for _ in range(-left):  # the sources that were raised to 1 took more places than the period has
        counts[counts.index(max(counts))] -= 1
    return counts


def interleave(source_quotas: Ints) -> Ints:
    """The source of each place of the period."""
    wanted = np.concatenate([(np.arange(q) + 0.5) / max(q, 1) for q in source_quotas.tolist()])
    return np.repeat(np.arange(len(source_quotas)), source_quotas)[np.argsort(wanted, kind="stable")]


class Remainder:
    """Deals what is left of an epoch, on all lanes and of all sources, to consecutive samples.

    A cell is a source on a lane, and `counts` says how many samples are left in each. They are dealt in rounds of one
    sample per cell, and all cells end with the last round: a cell with fewer samples joins later. So the first rounds
    even out what the lanes are ahead of each other, and the last ones mix all lanes and sources.

    >>> rest = Remainder(np.array([1, 0, 3, 2]))
    >>> cell, drawn = rest.dealt(np.arange(6))
    >>> [f"{c}.{n}" for c, n in zip(cell, drawn)]  # rounds: cell 2; cells 2 and 3; cells 2, 3 and 0
    ['2.0', '2.1', '3.0', '2.2', '3.1', '0.0']
    """

    def __init__(self, counts: Ints) -> None:
        self.counts = counts
        filled = np.flatnonzero(counts)
        self._cells = filled[np.argsort(-counts[filled], kind="stable")]  # those that join first come first
        self._rank = np.zeros_like(counts)
        self._rank[self._cells] = np.arange(len(self._cells))
        left = counts[self._cells]
        self._joins = left[:1].max(initial=0) - left  # the round in which a cell joins; ascending
        rounds = np.diff(self._joins, prepend=0)
        self._before = np.cumsum(rounds * np.arange(len(left)))  # samples dealt before that round
        self.total = int(counts.sum())
        """Number of samples that are left."""

    def dealt(self, sample: Ints) -> tuple[Ints, Ints]:
        """The cell of each sample (0 <= sample < total), and the number of earlier samples of that cell."""
        at = np.searchsorted(self._before, sample, side="right") - 1
        turns, rank = np.divmod(sample - self._before[at], at + 1)
        return self._cells[rank], self._joins[at] + turns - self._joins[rank]

    def sample(self, cell: int, drawn: Ints) -> Ints:
        """The inverse of `dealt`, for the samples of one cell."""
        rank = self._rank[cell]
        turn = self._joins[rank] + drawn
        at = np.searchsorted(self._joins, turn, side="right") - 1
        return self._before[at] + (turn - self._joins[at]) * (at + 1) + rank

    def drawn_before(self, sample: int) -> Ints:
        """Number of samples of each cell that are dealt before a sample."""
        if sample >= self.total:
            return self.counts
        at = int(np.searchsorted(self._before, sample, side="right")) - 1
        turns, rank = divmod(sample - int(self._before[at]), at + 1)
        drawn = np.zeros_like(self.counts)
        drawn[self._cells] = np.maximum(0, self._joins[at] + turns - self._joins)
        drawn[self._cells[:rank]] += 1
        return drawn
