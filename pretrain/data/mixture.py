"""Which source each position of a lane draws from. Pure functions of the weights."""

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
