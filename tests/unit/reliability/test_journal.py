"""The files of a run read back: exact values, torn lines, and the true history of several attempts."""

from __future__ import annotations

import json
import math
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.reliability import journal
from pretrain.reliability.journal import JsonLines, read_ledger, read_lines, read_metrics
from support import ROOT
from support.recording import a_monitor, a_record

# ---- JSON lines ----


@given(values=st.lists(st.floats(), min_size=1))
def test_floats_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    """NaN and infinities too, and every line is JSON as other languages read it."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    record = {str(i): value for i, value in enumerate(values)}
    text = json.dumps(journal.jsonable(record), allow_nan=False)
    json.loads(text, parse_constant=refuse)
    path = tmp_path_factory.getbasetemp() / "floats.jsonl"
    path.write_text(text + "\n")
    (back,) = read_lines(path)
    assert [struct.pack("d", back[str(i)]) for i in range(len(values)) if not math.isnan(values[i])] == [
        struct.pack("d", value) for value in values if not math.isnan(value)
    ]
    assert [math.isnan(back[str(i)]) for i in range(len(values))] == [math.isnan(value) for value in values]


@pytest.mark.parametrize("tail", [b'{"step": 2, "lo', b"x" * 200_000, b'{"step": 2}', b"\0" * 10])
def test_a_torn_line_is_left_out_and_cut_off(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"step": 1}\n' + tail)
    assert read_lines(path) == [{"step": 1}]
    lines = JsonLines(path)
    lines.append({"step": 3})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 3}\n'


def test_a_file_of_one_torn_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"step"')
    JsonLines(path).append({"step": 1})
    assert read_lines(path) == [{"step": 1}]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2"):
        read_lines(path)
    path.write_bytes(b"[1]\n")
    with pytest.raises(ValueError, match="line 1 is no JSON object"):
        read_lines(path)


def test_every_line_is_on_disk_when_the_writer_is_killed(tmp_path: Path) -> None:
    """The steps that the killed process had reported are all there."""
    script = (
        "import sys; from pathlib import Path\n"
        "sys.path.insert(0, 'tests'); from support.recording import a_monitor, a_record\n"
        "monitor = a_monitor(Path(sys.argv[1]))\n"
        "for step in range(1, 10**9):\n    monitor.step(a_record(step)); print(step, flush=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    told = [int(process.stdout.readline()) for _ in range(50)]
    os.kill(process.pid, signal.SIGKILL)
    told += [int(line) for line in process.stdout.read().split("\n") if line]
    process.wait()
    steps = [record["step"] for record in read_metrics(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= told[-1] >= 50


# ---- the true history ----


def attempt(
    run_dir: Path, number: int, resumed_at: int | None, last: int, ranks: int = 1, **how: Any
) -> None:
    """Write what an attempt records that was killed after step `last`; the loss is attempt + step / 1000."""
    monitors = [
        a_monitor(run_dir, "logging.sample_ledger=true", rank=rank, world_size=ranks, attempt=number)
        for rank in range(ranks)
    ]
    if how.get("with_event", True):
        name, facts = ("started", {}) if resumed_at is None else ("resumed", {"step": resumed_at})
        monitors[0].event(name, **facts)
    for step in range((resumed_at or 0) + 1, last + 1):
        for rank, m in enumerate(monitors):
            m.ledger(step, [step * 4 + rank], f"{number}-{step}-{rank}")
            m.step(a_record(step, loss=number + step / 1000))
    for m in monitors:
        m.close(0)


def by_attempt(records: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(record["step"], record["attempt"]) for record in records]


@pytest.mark.parametrize("with_event", [True, False])
def test_a_resumed_run_has_each_step_once(tmp_path: Path, with_event: bool) -> None:
    attempt(tmp_path, 1, None, 13, with_event=with_event)
    attempt(tmp_path, 2, 10, 11, with_event=with_event)
    expected = [(step, 1) for step in range(1, 11)] + [(11, 2)]
    assert by_attempt(read_metrics(tmp_path)) == expected
    assert read_metrics(tmp_path)[-1]["loss"] == 2.011
    assert by_attempt(read_ledger(tmp_path)) == expected


def test_an_attempt_that_resumed_and_did_no_step_yet_counts(tmp_path: Path) -> None:
    """Step 11 to 13 of the attempt before are no part of the present state any more."""
    attempt(tmp_path, 1, None, 13)
    attempt(tmp_path, 2, 10, 10)
    assert by_attempt(read_metrics(tmp_path)) == [(step, 1) for step in range(1, 11)]


def test_falling_back_behind_two_attempts(tmp_path: Path) -> None:
    """The third attempt finds the newest checkpoint damaged and goes on from an older one."""
    attempt(tmp_path, 1, None, 13)
    attempt(tmp_path, 2, 10, 25)
    attempt(tmp_path, 3, 5, 7)
    assert by_attempt(read_metrics(tmp_path)) == [(s, 1) for s in range(1, 6)] + [(6, 3), (7, 3)]


def test_starting_again_from_nothing(tmp_path: Path) -> None:
    attempt(tmp_path, 1, None, 3)
    attempt(tmp_path, 2, None, 2)
    assert by_attempt(read_metrics(tmp_path)) == [(1, 2), (2, 2)]


def test_a_rollback_within_an_attempt(tmp_path: Path) -> None:
    m = a_monitor(tmp_path)
    for step, loss in [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (2, 2.5), (3, 3.5)]:
        m.step(a_record(step, loss=loss))
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.5), (3, 3.5)]


def test_the_ledger_of_another_number_of_ranks(tmp_path: Path) -> None:
    attempt(tmp_path, 1, None, 3, ranks=2)
    attempt(tmp_path, 2, 2, 4, ranks=1)
    attempt(tmp_path, 3, 3, 4, ranks=2)
    assert [(e["step"], e["rank"], e["attempt"]) for e in read_ledger(tmp_path)] == [
        *((1, 0, 1), (1, 1, 1), (2, 0, 1), (2, 1, 1), (3, 0, 2)),
        *((4, 0, 3), (4, 1, 3)),
    ]
    expected = {"step": 1, "attempt": 1, "rank": 1, "samples": [5], "tokens_xxh3": "1-1-1"}
    assert read_ledger(tmp_path)[1] == expected


def test_evaluations_stand_in_the_record_of_their_step(tmp_path: Path) -> None:
    m = a_monitor(tmp_path)
    for step in range(1, 4):
        m.step(a_record(step))
    m.evaluation(2, {"loss": 2.5, "heldout/perplexity": 12.0})
    records = read_metrics(tmp_path)
    assert (records[1]["heldout/loss"], records[1]["heldout/perplexity"], records[1]["loss"]) == (
        2.5,
        12.0,
        3.0,
    )
    assert "heldout/loss" not in records[2]
    attempt(tmp_path, 2, 1, 2)  # goes back behind the evaluation: it is no longer true
    assert "heldout/loss" not in read_metrics(tmp_path)[1]


def test_a_run_that_recorded_nothing(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    assert read_ledger(tmp_path) == []
