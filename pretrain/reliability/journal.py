"""The record of a run on disk: files of JSON lines that survive a killed writer, and the true history they tell.

    metrics.jsonl           one line per step, one per evaluation, of every attempt
    events.jsonl            one line per event
    ledger/rank-NNNNN.jsonl the samples of each step, per rank

Needs no torch, so that reading a run is quick. docs/monitoring.md describes every field.
"""

from __future__ import annotations

import json
import math
import numbers
import os
import sys
import threading
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

from pretrain.errors import ConfigError
from pretrain.files import open_for_append, open_regular
from pretrain.printing import visible

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
LEDGER_FOLDER = "ledger"
MAX_LINE_BYTES = 64 << 20
"""A line of the ledger names every sample of a rank's step."""
HELDOUT_PREFIX = "heldout/"
ROLLBACK = "rollback"
"""Kind of a line in metrics and ledger that says: the steps from this one on are undone."""

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def say(line: str) -> None:
    """One line on stderr, whatever state stderr is in; what it quotes of events and logs is made visible."""
    line = visible(line)
    try:
        if sys.stderr.isatty():
            from rich.console import Console

            Console(stderr=True).print(line, markup=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):  # the terminal or the reader of the pipe is gone
        pass


# ---- JSON lines ------------------------------------------------------------------------------------------------------


class JsonLines:
    """Appends records to one file of JSON lines; one writer at a time.

    A record is written by one system call, so that it survives the death of the process at any later moment. A line
    torn by a killed writer is cut off at opening, one torn by a full disk at once. Floats are written so that reading
    gives the same bits; NaN and infinities as the strings "NaN", "Infinity", "-Infinity", since JSON has none.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._warned = False
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = open_for_append(path)
            _cut_torn_line(self._descriptor)
        except OSError as error:
            self._warn(error)

    def append(self, record: dict[str, Any]) -> None:
        """Write one record. A failure is reported once; later records are tried again."""
        line = json.dumps(jsonable(record), allow_nan=False).encode() + b"\n"
        with self._lock:
            if self._descriptor is None:
                return
            try:
                end = os.fstat(self._descriptor).st_size
                if os.write(self._descriptor, line) < len(line):
                    os.ftruncate(self._descriptor, end)
                    raise OSError("no space left for a whole line")
            except OSError as error:
                self._warn(error)

    def close(self) -> None:
        """No record can be written after this."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
            self._descriptor = None

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            say(
                f"warning: {self._path} cannot be written ({error.strerror or error}); training goes on without it"
            )
        self._warned = True


def _cut_torn_line(descriptor: int) -> None:
    """Shorten the file to its last line feed."""
    end = os.fstat(descriptor).st_size
    start = end
    while start > 0:
        start = max(0, start - 65536)
        at = os.pread(descriptor, min(65536, end - start), start).rfind(b"\n")
        if at >= 0:
            start += at + 1
            break
    if start < end:
        os.ftruncate(descriptor, start)


def jsonable(value: Any) -> Any:
    """The value as JSON can hold it; what JSON has no type for becomes text."""
    match value:
        case None | bool() | str():
            return value
        case Enum():
            return value.name
        case numbers.Integral():
            return int(value)
        case numbers.Real():
            number = float(value)
            if math.isfinite(number):
                return number
            return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
        case dict():
            return {str(key): jsonable(item) for key, item in value.items()}
        case list() | tuple():
            return [jsonable(item) for item in value]
        case _:
            return str(value)


def read_lines(path: str | Path, **required: type) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; without the last line where it is torn or still being written.

    `required`: keys that each record must have, and the types of their values. A missing file has no records. Raises
    ConfigError where an earlier line is no such JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    records = []
    with open_regular(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
            if not line.endswith(b"\n"):
                if len(line) == MAX_LINE_BYTES:
                    raise ConfigError(f"{path}, line {number} has more than {MAX_LINE_BYTES:,} bytes")
                break
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}, line {number} is no JSON: {error}") from error
            if not isinstance(record, dict):
                raise ConfigError(f"{path}, line {number} is no JSON object")
            for key, kind in required.items():
                if type(record.get(key)) is not kind:
                    raise ConfigError(f"{path}, line {number} has no {key}, or one of another type")
            records.append({k: _NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in record.items()})
    return records


# ---- the true history of a run ---------------------------------------------------------------------------------------


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """One record per step that the run's present state is made of, in order of step.

    Steps that a killed attempt had done after its last checkpoint are left out as soon as the next attempt has
    resumed. Held-out results (keys heldout/...) stand in the record of their step.
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
            history[result["step"]] |= {k: v for k, v in result.items() if k.startswith(HELDOUT_PREFIX)}
    return list(history.values())


def read_ledger(run_dir: str | Path) -> list[dict[str, Any]]:
    """What every rank trained on, in order of (step, rank): step, attempt, rank, samples, tokens_xxh3.

    As in `read_metrics`, steps that were done again stand here once.
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
    """The first step of each attempt: from its event `started` or `resumed`, else from the first line it wrote."""
    first: dict[int, int] = {}
    for event in read_lines(Path(run_dir) / EVENTS_FILE, event=str):
        if event["event"] in ("started", "resumed"):
            attempt, step = event.get("attempt"), event.get("step", 0)
            if type(attempt) is not int or type(step) is not int:
                raise ConfigError(f"{run_dir}/{EVENTS_FILE} has a start without its attempt or step")
            first[attempt] = step + 1 if event["event"] == "resumed" else 1
    earliest: dict[int, int] = {}
    for line in lines:
        earliest[line["attempt"]] = min(line["step"], earliest.get(line["attempt"], line["step"]))
    return earliest | first


def _still_true(lines: list[dict[str, Any]], first_steps: dict[int, int]) -> list[dict[str, Any]]:
    """One file's lines without what a later attempt, or a rollback within an attempt, did again."""
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
