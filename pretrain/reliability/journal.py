"""Reads a run's files and reconstructs its true history: the steps that led to its present state.

    metrics.jsonl           one line per step and one per evaluation, of all attempts
    events.jsonl            one line per event
    ledger/rank-NNNNN.jsonl the samples that one rank trained on, one line per step

All are files of JSON lines (`json_lines`), and writers only append. An attempt that is killed may have done steps
after its last checkpoint; the next attempt repeats them, and a rollback repeats steps within an attempt. The files
therefore hold such steps more than once, and only the last time counts.

This module imports no torch, so that reading a run is quick. docs/monitoring.md describes every field.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pretrain.errors import ConfigError
from pretrain.reliability.events import EVENTS_FILE, Event, read_events
from pretrain.reliability.json_lines import read_lines

METRICS_FILE = "metrics.jsonl"
LEDGER_FOLDER = "ledger"
HELDOUT_PREFIX = "heldout/"
TASK_PREFIX = "task/"
"""Beginnings of the names of what an evaluation measures: on held-out text, and on tasks."""
ROLLBACK = "rollback"
"""The kind of a line in the metrics and the ledger which says that the line's step and all later ones are undone."""


# ---- the true history of a run ---------------------------------------------------------------------------------------


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """One record for each step that led to the run's present state, ordered by step.

    Steps that a killed attempt did after its last checkpoint are left out as soon as the next attempt has resumed.
    Results of evaluations (keys heldout/... and task/...) are part of the record of their step.
    """
    lines = [
        line
        for line in read_lines(Path(run_dir) / METRICS_FILE, kind=str, step=int, attempt=int)
        if line["kind"] in ("step", "evaluation", ROLLBACK)
    ]
    first_steps = _first_steps(run_dir, (line for line in lines if line["kind"] == "step"))
    kinds: dict[str, list[dict[str, Any]]] = {"step": [], "evaluation": []}
    for line in lines:
        for kind in kinds if line["kind"] == ROLLBACK else (line["kind"],):
            kinds[kind].append({k: v for k, v in line.items() if k != "kind" or v == ROLLBACK})
    history = {record["step"]: record for record in _still_true(kinds["step"], first_steps)}
    for result in _still_true(kinds["evaluation"], first_steps):
        if result["step"] in history:
            measured = {k: v for k, v in result.items() if k.startswith((HELDOUT_PREFIX, TASK_PREFIX))}
            history[result["step"]] |= measured
    return list(history.values())


def heldout_losses_of(run_dir: str | Path, metric: str) -> dict[int, float]:
    """The value of heldout/<metric>, by step, at each evaluation of the run so far that gave a number."""
    key = HELDOUT_PREFIX + metric
    found = {record["step"]: record[key] for record in read_metrics(run_dir) if key in record}
    return {step: loss for step, loss in found.items() if type(loss) is float and math.isfinite(loss)}


def read_ledger(run_dir: str | Path) -> list[dict[str, Any]]:
    """The samples that every rank trained on, ordered by step, then rank.

    The keys of an entry are step, attempt, rank, samples and tokens_xxh3. A step that was repeated is listed once, as
    in `read_metrics`.
    """
    paths = sorted((Path(run_dir) / LEDGER_FOLDER).glob("rank-*.jsonl"))
    by_rank = {
        int(path.stem.removeprefix("rank-")): read_lines(path, step=int, attempt=int) for path in paths
    }
    first_steps = _first_steps(run_dir, (line for lines in by_rank.values() for line in lines))
    entries = [
        {**line, "rank": rank} for rank, lines in by_rank.items() for line in _still_true(lines, first_steps)
    ]
    return sorted(entries, key=lambda entry: (entry["step"], entry["rank"]))


def _first_steps(run_dir: str | Path, lines: Iterable[dict[str, Any]]) -> dict[int, int]:
    """The first step of each attempt, from its event `started` or `resumed`, or else from its earliest line."""
    first: dict[int, int] = {}
    for event in read_events(run_dir):
        if event["event"] in (Event.STARTED, Event.RESUMED):
            attempt, step = event.get("attempt"), event.get("step", 0)
            if type(attempt) is not int or type(step) is not int:
                raise ConfigError(
                    f"{run_dir}/{EVENTS_FILE} has a started or resumed event without an attempt or a step"
                )
            first[attempt] = step + 1 if event["event"] == Event.RESUMED else 1
    earliest: dict[int, int] = {}
    for line in lines:
        earliest[line["attempt"]] = min(line["step"], earliest.get(line["attempt"], line["step"]))
    return earliest | first


def _still_true(lines: list[dict[str, Any]], first_steps: dict[int, int]) -> list[dict[str, Any]]:
    """The lines of one file, without the steps that a later attempt or a rollback has undone."""
    undone_from: dict[int, float] = {}
    lowest = math.inf
    for attempt in sorted(first_steps, reverse=True):
        undone_from[attempt] = lowest
        lowest = min(lowest, first_steps[attempt])
    kept: list[dict[str, Any]] = []
    for line in lines:
        if line["step"] >= undone_from.get(line["attempt"], math.inf):
            continue
        while kept and kept[-1]["step"] >= line["step"]:
            kept.pop()
        if line.get("kind") != ROLLBACK:
            kept.append(line)
    return kept
