"""Verdicts on made pairs: how often a real difference is found, and how often there is a false alarm."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pretrain.errors import ConfigError
from pretrain.evaluate.compare import Comparison, Tables, compare, holm, p_by_exchange, results_in
from pretrain.evaluate.results import Overlap, Results, records, scored
from pretrain.evaluate.scores import Array
from support.trained_run import script

Task = dict[str, list[Results]]


def results(
    statistics: dict[str, Array], first_id: int = 0, task: str = "made", overlap: Overlap | None = None
) -> Results:
    n = len(next(iter(statistics.values())))
    ids = [(str(first_id + number), f"hash {first_id + number}") for number in range(n)]
    return Results(
        format=1,
        task=task,
        kind="classification",
        task_sha256="",
        run_dir="run",
        step=1,
        tokens_seen=1,
        precision="fp32",
        n_examples=0,
        chat=False,
        main=next(iter(statistics)),
        scores=scored(statistics),
        truncated=0,
        empty=0,
        unscored=[],
        items=records(ids, statistics, ["x"] * n, [["y"]] * n),
        overlap=overlap,
    )


def of(hits: Array, first_id: int = 0) -> Results:
    return results({"accuracy": hits.astype(float)[:, None]}, first_id)


def one(a: list[Results], b: list[Results], n_exchanges: int = 499) -> Comparison:
    (found,) = compare({"made": a}, {"made": b}, n_exchanges=n_exchanges)
    return found


def share_of_alarms(gain: float, *, paired: bool, n_trials: int = 200, n_items: int = 150) -> float:
    """How often two models are called different of which one is right on `gain` more of the items. Both find the same
    items hard."""
    draw = np.random.default_rng(5)
    alarms = 0
    for trial in range(n_trials):
        ease = draw.beta(2, 2, n_items)
        other = ease if paired else draw.beta(2, 2, n_items)
        hits = draw.random(n_items) < ease, draw.random(n_items) < np.minimum(1, other + gain)
        a, b = ([found.astype(float)[:, None]] for found in hits)
        alarms += p_by_exchange("accuracy", Tables(a, b, paired, 0), trial, 199) < 0.05
    return alarms / n_trials


@pytest.mark.parametrize("paired", [True, False])
def test_false_alarms_are_as_rare_as_asked(paired: bool) -> None:
    """Of 200 trials without a difference 5 % are expected; more than 9 % would come by chance once in 100 times. The
    test is a little conservative, since equal differences count as larger."""
    assert 0.005 <= share_of_alarms(0.0, paired=paired) <= 0.09


def test_real_differences_are_found() -> None:
    """Two models that are right with probabilities p and p + 0.2 (at most 1) differ by 0.19 on 150 items, with a
    standard error of 0.05, so the difference is found in 96 % of trials. Fewer than 90 % of 200 trials would come by
    chance less than once in 10,000 times."""
    assert share_of_alarms(0.2, paired=True) >= 0.9


def test_pairs_show_what_the_whole_hides() -> None:
    """B is right wherever A is, and on 12 more of 400 items; without pairs this is noise."""
    a = np.arange(400) % 2 == 0
    b = a | (np.arange(400) % 33 == 1)
    paired, unpaired = one([of(a)], [of(b)]), one([of(a)], [of(b, 1000)])
    assert paired.difference == unpaired.difference == pytest.approx((b.sum() - a.sum()) / 400)
    assert (paired.is_paired, paired.verdict) == (True, "real: B is better")
    assert (unpaired.is_paired, unpaired.verdict) == (False, "within noise")
    assert 0 < paired.low < paired.difference < paired.high
    assert unpaired.low < 0 < unpaired.high


def test_lower_is_better_for_a_loss() -> None:
    tokens = np.full(60, 10.0)
    nll = np.random.default_rng(0).normal(30, 1, 60)
    a, b = (results({"loss": np.stack([sums, tokens], 1)}) for sums in (nll, nll - 1))
    found = one([a], [b])
    assert found.difference == pytest.approx(-0.1)
    assert found.verdict == "real: B is better"


def test_items_that_one_side_lacks_are_left_out_and_counted() -> None:
    hits = np.arange(100) % 3 == 0
    found = one([of(hits)], [of(hits[10:], 10)])
    assert (found.is_paired, found.n_items, found.left_out, found.difference) == (True, 90, 10, 0.0)


def test_equal_results_are_no_difference() -> None:
    found = one([of(np.arange(50) % 2 == 0)], [of(np.arange(50) % 2 == 0)])
    assert (found.p, found.verdict) == (1.0, "within noise")


def test_the_spread_of_seeds_is_noise() -> None:
    """The same gain on the same items is real for runs that agree, and noise for runs that spread as much."""
    base = np.arange(1000) % 2 == 0
    runs = {
        name: [of(base & (np.arange(1000) % 40 != n)) if n else of(base) for n in numbers]
        for name, numbers in {"steady": (6, 8, 10), "wild": (6, 0, 0)}.items()
    }
    better = base | (np.arange(1000) % 20 == 3)
    found = one([of(base)] * 3, [of(better)] * 3)
    assert (found.a.n_seeds, found.a.spread) == (3, 0.0)
    assert found.is_real
    low = [of(base & (np.arange(1000) >= 200 * n)) for n in (0, 1, 2)]
    wild = one(low, [of(better)] * 3)
    assert wild.difference > found.difference
    assert wild.a.spread == pytest.approx(0.1, rel=0.01)
    assert not wild.is_real
    assert one(runs["steady"], runs["wild"]).p <= 1


def test_holm_corrects_for_the_number_of_comparisons() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx(
        [0.03, 0.06, 0.06, 0.02]
    )  # R: p.adjust(p, "holm")
    assert holm([0.5]) == [0.5]


def test_one_of_many_tasks_needs_more() -> None:
    """20 tasks, of which one differs by chance with p = 0.03."""
    draw = np.random.default_rng(0)
    a: Task = {}
    b: Task = {}
    for number in range(20):
        name = f"task {number}"
        hits = draw.random(60) < 0.5
        others = hits.copy()
        if number == 0:
            others[np.flatnonzero(~hits)[:6]] = True  # 6 items against 0: p = 2 / 64
        a[name], b[name] = (
            [results({"accuracy": h.astype(float)[:, None]}, task=name)] for h in (hits, others)
        )
    rows = compare(a, b)
    assert rows[0].p == pytest.approx(2 / 64, abs=0.01)
    assert rows[0].p_corrected > 0.5
    assert not any(row.is_real for row in rows)
    assert compare({"task 0": a["task 0"]}, {"task 0": b["task 0"]})[0].is_real


# --- the command ---


def test_folders_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for side, share in (("a", 3), ("b", 2)):
        (tmp_path / side).mkdir()
        hits = (np.arange(300) % share == 0).astype(float)[:, None]
        overlap = Overlap(corpus="corpus", items=200, found=50, too_short=100)
        results({"accuracy": hits}, overlap=overlap).write(tmp_path / side / "made.json")
    command = script("compare")
    command.compare_folders(tmp_path / "a", tmp_path / "b", [], 0.05, True)
    printed = capsys.readouterr()
    (row,) = json.loads(printed.out.splitlines()[-1])
    assert row["difference"] == pytest.approx(0.5 - 1 / 3)
    assert row["verdict"] == "real: B is better"
    assert row["overlap"] == 0.25
    assert "25.0%" in printed.out
    assert "each side is one run" in printed.err


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    hits = np.arange(10) % 2 == 0
    with pytest.raises(ConfigError, match="does not exist"):
        results_in(tmp_path / "none")
    with pytest.raises(ConfigError, match="holds no results"):
        results_in(tmp_path)
    (tmp_path / "x.json").write_text('{"format": 1}')
    with pytest.raises(ConfigError, match=r"x\.json is not a file of results"):
        results_in(tmp_path)
    with pytest.raises(ConfigError, match="no task in common"):
        compare({"made": [of(hits)]}, {"other": [of(hits)]})
    with pytest.raises(ConfigError, match="no score named bleu"):
        compare({"made": [of(hits)]}, {"made": [of(hits)]}, ["bleu"])


def test_results_are_read_back_as_written(tmp_path: Path) -> None:
    one = of(np.arange(10) % 2 == 0)
    one.write(tmp_path / "made.json")
    assert results_in(tmp_path) == {"made": [one]}
