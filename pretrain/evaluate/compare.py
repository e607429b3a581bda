"""Tells a real difference between two models from noise.

Where both were scored on the same items, each item is compared with itself, which takes away what makes items easy or
hard. The verdict comes from a randomization test: if there were no difference, exchanging the two models' answers to
any items would give a difference as large as the one found as often as chance says. Several tasks at once are corrected
by Holm's method. Several results of one side are runs with other seeds; their spread then counts as noise, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pretrain.errors import ConfigError
from pretrain.evaluate.results import Results, read_results
from pretrain.evaluate.scores import MAX_WEIGHTS, N_RESAMPLES, Array, lacks, score_named, value_of

N_EXCHANGES = 4999
"""Number of exchanges in a test; the smallest p-value is 1 / 5000."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """A score of one side of a comparison."""

    value: float
    """The mean where there are several seeds."""
    spread: float | None
    """Standard deviation over seeds; None for one."""
    n_seeds: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One score of one task, of A and of B."""

    task: str
    score: str
    a: Side
    b: Side
    difference: float
    """B - A."""
    low: float
    high: float
    """The interval that holds the true difference with the confidence 1 - alpha, without correction."""
    p: float
    """How often chance alone gives such a difference."""
    p_corrected: float
    """The same, corrected for the number of comparisons."""
    is_real: bool
    is_paired: bool
    n_items: int
    """Number of items of A that are compared."""
    left_out: int
    """Number of items that only one side has, which a paired comparison leaves out."""
    higher_is_better: bool
    overlap: float | None
    """Share of the items with text in the training corpus, the larger of A and B; None where none was looked for."""

    @property
    def verdict(self) -> str:
        """In words."""
        if not self.is_real:
            return "within noise"
        return f"real: {'B' if (self.difference > 0) == self.higher_is_better else 'A'} is better"


# ---- reading ---------------------------------------------------------------------------------------------------------


def results_in(path: Path) -> dict[str, list[Results]]:
    """The results in a file, or in a folder and its subfolders, by task; several of one task are those of several
    seeds. Raises ConfigError."""
    if not path.exists():
        raise ConfigError(f"{path} does not exist; give a file or a folder of results of launch/eval.py")
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"{path} holds no results; give the folder that launch/eval.py wrote with output=")
    found: dict[str, list[Results]] = {}
    for file in files:
        results = read_results(file)
        found.setdefault(results.task, []).append(results)
    return found


# ---- comparing -------------------------------------------------------------------------------------------------------


def compare(
    a: dict[str, list[Results]],
    b: dict[str, list[Results]],
    scores: Sequence[str] = (),
    *,
    alpha: float = 0.05,
    seed: int = 0,
    n_exchanges: int = N_EXCHANGES,
) -> list[Comparison]:
    """Compare the tasks that both sides have: the main score of each, or those of `scores` that it has.

    Raises ConfigError where there is nothing to compare.
    """
    found = []
    for task in (name for name in a if name in b):
        known = [name for name in a[task][0].scores if all(name in r.scores for r in [*a[task], *b[task]])]
        for name in scores or [a[task][0].main]:
            if name in known:
                found.append(_compare(task, name, a[task], b[task], alpha, seed, n_exchanges))
    if not found:
        what = f"no score named {', '.join(scores)}" if scores else "no task"
        raise ConfigError(f"A and B have {what} in common; A has the tasks {', '.join(a)}, B {', '.join(b)}")
    corrected = holm([row.p for row in found])
    return [
        Comparison(**{**vars(row), "p_corrected": p, "is_real": p < alpha})
        for row, p in zip(found, corrected, strict=True)
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm, 1979): the chance of one false alarm among all stays below each."""
    order = np.argsort(p_values, kind="stable")
    corrected, largest = np.zeros(len(p_values)), 0.0
    for rank, number in enumerate(order.tolist()):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[number]))
        corrected[number] = largest
    return corrected.tolist()


class Tables(NamedTuple):
    """The statistics [items, k] of each result of both sides."""

    a: list[Array]
    b: list[Array]
    is_paired: bool
    """Whether row i is the same item everywhere."""
    left_out: int


def tables_of(name: str, a: Sequence[Results], b: Sequence[Results]) -> Tables:
    """The statistics of one score, of the same items in the same order if most items are the same on both sides."""
    rows = [
        {(item.id, item.hash): row for item, row in zip(r.items, r.statistics(name), strict=True)}
        for r in [*a, *b]
    ]
    common = [key for key in rows[0] if all(key in other for other in rows[1:])]
    most = max(map(len, rows))
    if 2 * len(common) >= most:
        tables = [np.array([of_result[key] for key in common]) for of_result in rows]
    else:
        tables = [np.array(list(of_result.values())) for of_result in rows]
    is_paired = 2 * len(common) >= most
    return Tables(tables[: len(a)], tables[len(a) :], is_paired, most - len(common) if is_paired else 0)


def _compare(
    task: str,
    name: str,
    a: Sequence[Results],
    b: Sequence[Results],
    alpha: float,
    seed: int,
    n_exchanges: int,
) -> Comparison:
    tables = tables_of(name, a, b)
    sides = [_side([value_of(name, rows) for rows in group]) for group in (tables.a, tables.b)]
    difference = sides[1].value - sides[0].value
    drawn = _resampled_differences(name, tables, seed)
    if len(a) == len(b) == 1:
        low, high = np.quantile(drawn, [alpha / 2, 1 - alpha / 2]).tolist()
        p = p_by_exchange(name, tables, seed, n_exchanges)
    else:
        low, high, p = _with_seeds(difference, float(drawn.std(ddof=1)), sides, alpha)
    overlaps = [r.overlap.share for r in [*a, *b] if r.overlap is not None and r.overlap.items]
    return Comparison(
        task=task,
        score=name,
        a=sides[0],
        b=sides[1],
        difference=difference,
        low=low,
        high=high,
        p=p,
        p_corrected=p,
        is_real=False,
        is_paired=tables.is_paired,
        n_items=len(tables.a[0]),
        left_out=tables.left_out,
        higher_is_better=score_named(name).higher_is_better,
        overlap=max(overlaps, default=None),
    )


def _side(values: Sequence[float]) -> Side:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Side(value=float(np.mean(values)), spread=spread, n_seeds=len(values))


def _blocks(n_rows: int, n_columns: int) -> Iterator[int]:
    """Numbers of rows of weights that are held at a time."""
    step = max(1, MAX_WEIGHTS // n_columns)
    for first in range(0, n_rows, step):
        yield min(step, n_rows - first)


def _resampled_differences(name: str, tables: Tables, seed: int) -> Array:
    """The difference on resampled items; of paired ones, the same are drawn for both sides."""
    of, draw = score_named(name).of, np.random.default_rng(seed)
    n_a, n_b = len(tables.a[0]), len(tables.b[0])

    def weights(n_rows: int, n: int) -> Array:
        return np.array(
            [np.bincount(draw.integers(n, size=n), minlength=n) for _ in range(n_rows)], np.float64
        )

    found = []
    for n_rows in _blocks(N_RESAMPLES, n_a + n_b):
        of_a = weights(n_rows, n_a)
        of_b = of_a if tables.is_paired else weights(n_rows, n_b)
        means = [
            np.mean([of(rows, drawn) for rows in group], axis=0)
            for group, drawn in ((tables.a, of_a), (tables.b, of_b))
        ]
        found.append(means[1] - means[0])
    return np.concatenate(found)


def p_by_exchange(name: str, tables: Tables, seed: int, n_exchanges: int) -> float:
    """How often a difference as large comes from exchanging the sides at random: item by item where items are the same,
    else among all items."""
    of, draw = score_named(name).of, np.random.default_rng(seed + 1)
    (a,), (b,) = tables.a, tables.b
    both, n_a, n = np.concatenate([a, b]), len(a), len(a) + len(b)
    is_b = np.arange(n) >= n_a

    def differences(from_b: np.ndarray) -> Array:
        return of(both, from_b.astype(np.float64)) - of(both, (~from_b).astype(np.float64))

    (observed,) = np.abs(differences(is_b[None]))
    as_large = 0
    for n_rows in _blocks(n_exchanges, n):
        if tables.is_paired:
            swapped = draw.integers(2, size=(n_rows, n_a)).astype(bool)
            from_b = np.concatenate([swapped, ~swapped], 1)
        else:
            from_b = draw.permuted(np.tile(is_b, (n_rows, 1)), axis=1)
        # Sums in another order differ in the last digits; such differences are equal.
        as_large += int((np.abs(differences(from_b)) >= observed * (1 - 1e-9)).sum())
    return (as_large + 1) / (n_exchanges + 1)


def _with_seeds(
    difference: float, of_items: float, sides: Sequence[Side], alpha: float
) -> tuple[float, float, float]:
    """The interval and the p-value where a side has several seeds: a t-test, whose error is that of the items and that
    of the seeds together. A side with one seed is taken to spread like the other one."""
    try:
        from scipy.stats import t  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError as error:
        raise lacks(error, "a comparison of several seeds") from error
    free = sum(side.n_seeds - 1 for side in sides)
    pooled = sum((side.n_seeds - 1) * side.spread**2 for side in sides if side.spread is not None) / free
    error_of_both = math.sqrt(of_items**2 + sum(pooled / side.n_seeds for side in sides))
    if error_of_both == 0:
        return difference, difference, 1.0 if difference == 0 else 0.0
    width = float(t.ppf(1 - alpha / 2, free)) * error_of_both
    return difference - width, difference + width, float(2 * t.sf(abs(difference) / error_of_both, free))
