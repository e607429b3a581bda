"""Scores of a whole set from statistics of its items, so that any weights of the items give a score.

A resampled set is the same items with other weights. A score is therefore a function of the items' statistics and of
rows of weights, one score per row: BLEU from counts of n-grams, macro-averaged F1 from pairs of labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pretrain.errors import ConfigError

Array = NDArray[np.float64]
N_BINS = 10
"""Number of bins of equal width for the expected calibration error."""
_LOWER_IS_BETTER = ("loss", "bits_per_byte", "gold_bits_per_byte", "ece", "brier", "log_loss")


class Score(NamedTuple):
    """How a score of a set is computed."""

    of: Callable[[Array, Array], Array]
    """Scores [R] of statistics [items, k] under weights [R, items]."""
    higher_is_better: bool


def score_named(name: str) -> Score:
    """The score of that name. One without a rule of its own is the sum of the first statistic over that of the second;
    with one statistic it is the mean."""
    match name:
        case "bleu" | "chrf":
            of: Callable[[Array, Array], Array] = partial(_of_sums, name)
        case "macro_precision" | "macro_recall" | "macro_f1":
            of = partial(_macro, name)
        case "ece":
            of = _ece
        case _:
            of = _ratio
    return Score(of, name not in _LOWER_IS_BETTER)


def value_of(name: str, statistics: Array) -> float:
    """The score of all items, each counted once."""
    return float(score_named(name).of(statistics, np.ones((1, len(statistics))))[0])


def _ratio(statistics: Array, weights: Array) -> Array:
    below = weights @ statistics[:, 1] if statistics.shape[1] > 1 else weights.sum(1)
    return (weights @ statistics[:, 0]) / np.where(below > 0, below, np.nan)


def _macro(name: str, statistics: Array, weights: Array) -> Array:
    """Precision, recall or F1, averaged over the labels that occur. Statistics are the right label and the predicted
    one, as numbers."""
    pairs = statistics.astype(np.int64)
    n = int(pairs.max()) + 1
    cells = pairs[:, 0] * n + pairs[:, 1]
    counts = np.stack([np.bincount(cells, row, n * n).reshape(n, n) for row in weights])
    hits = np.diagonal(counts, axis1=1, axis2=2)
    right, predicted = counts.sum(2), counts.sum(1)
    over = {"macro_precision": predicted, "macro_recall": right, "macro_f1": (right + predicted) / 2}[name]
    each = hits / np.where(over > 0, over, 1)
    occurs = right > 0
    return (each * occurs).sum(1) / np.maximum(1, occurs.sum(1))


def _ece(statistics: Array, weights: Array) -> Array:
    """Expected calibration error (Guo et al., 2017): the gap between confidence and accuracy in each bin, weighted by
    the items in it. Statistics are the probability of the predicted label, and 1 where it is right."""
    confidence, is_right = statistics.T
    bins = np.minimum((confidence * N_BINS).astype(np.int64), N_BINS - 1)
    member = (bins[:, None] == np.arange(N_BINS)).astype(np.float64)
    gaps = np.abs(weights @ (member * (confidence - is_right)[:, None])).sum(1)
    return gaps / np.maximum(1e-300, weights.sum(1))


def _of_sums(name: str, statistics: Array, weights: Array) -> Array:
    """BLEU or chrF of summed counts."""
    metric = sacrebleu_metric(name)
    # `_compute_score_from_stats` is what sacrebleu's own resampling calls; the counts are whole numbers again.
    sums = np.rint(weights @ statistics).astype(np.int64).tolist()
    return np.array([metric._compute_score_from_stats(row).score for row in sums])


@cache
def sacrebleu_metric(name: str, language: str = "en") -> Any:
    """BLEU or chrF of sacrebleu, with its defaults. Language matters for BLEU only, which counts words. Raises
    ConfigError without the package."""
    try:
        from sacrebleu.metrics import BLEU, CHRF  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise lacks(error, name) from error
    return CHRF() if name == "chrf" else BLEU(tokenize="zh" if language == "zh" else "13a", force=True)


def lacks(error: ImportError, score: str) -> ConfigError:
    """The sentence for a score whose package is not installed."""
    return ConfigError(
        f"{score} needs the package {error.name}; install it with: pip install 'pretrain[eval]'"
    )


# ---- noise -----------------------------------------------------------------------------------------------------------

N_RESAMPLES = 1000
MAX_WEIGHTS = 1 << 22
"""Weights that exist at a time."""


def standard_error(name: str, statistics: Array, seed: int = 0, n_resamples: int = N_RESAMPLES) -> float:
    """The standard deviation of a score over resampled items (bootstrap). NaN for a single item."""
    if len(statistics) < 2:
        return math.nan
    return float(np.nanstd(resampled(name, statistics, seed, n_resamples), ddof=1))


def resampled(name: str, statistics: Array, seed: int = 0, n_resamples: int = N_RESAMPLES) -> Array:
    """The scores of sets of as many items, drawn with replacement: float64 [n_resamples]."""
    draw, of, n = np.random.default_rng(seed), score_named(name).of, len(statistics)
    step = max(1, MAX_WEIGHTS // n)
    found = []
    for first in range(0, n_resamples, step):
        rows = [
            np.bincount(draw.integers(n, size=n), minlength=n) for _ in range(min(step, n_resamples - first))
        ]
        found.append(of(statistics, np.array(rows, np.float64)))
    return np.concatenate(found)
