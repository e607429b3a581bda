"""The files of a run read back: exact values, torn lines, and the true history of several attempts."""

from __future__ import annotations

import ast
import fcntl
import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.state import Substitution
from pretrain.engine.micro_batch import FoundMicroBatch
from pretrain.reliability import json_lines
from pretrain.reliability.events import (
    EVENTS_FILE,
    Event,
    EventLog,
    RankFailure,
    finished_pattern,
    read_events,
)
from pretrain.reliability.journal import read_ledger, read_metrics
from pretrain.reliability.json_lines import JsonLines, jsonable, read_lines
from pretrain.reliability.processes import status_of
from pretrain.reliability.watcher import Watcher
from pretrain.train.stragglers import Straggler
from support import ROOT
from support.recording import a_monitor, a_record

# ---- JSON lines ----


@given(values=st.lists(st.floats(), min_size=1))
def test_floats_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    """NaN and infinities too, and every line is JSON as other languages read it."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    record = {str(i): value for i, value in enumerate(values)}
    text = json.dumps(jsonable(record), allow_nan=False)
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


# ---- events, which two processes write ----

FULL_DISK = """
import os, resource, sys, time
from pathlib import Path
from pretrain.reliability.events import Event, EventLog
cut = os.ftruncate
os.ftruncate = lambda *arguments: (time.sleep(0.01), cut(*arguments))  # what is torn can be seen
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
log, attempt = EventLog(Path(sys.argv[1])), int(sys.argv[2])
log.append(Event.STARTED, attempt)
print("started", flush=True)
while True:
    log.append(Event.WANDB_FAILED, attempt, reason="x" * 70_000)
    time.sleep(0.005)
"""
"""A process that has room for its first event and for a part of each later one."""


def stop_in_half_a_line(process: subprocess.Popen[str], path: Path) -> None:
    """Stop a process between the short write of a line and the cut."""
    for _ in range(1000):
        process.send_signal(signal.SIGSTOP)
        while status_of(process.pid).state != "T":
            time.sleep(0.0005)
        if not path.read_bytes().endswith(b"\n"):
            return
        process.send_signal(signal.SIGCONT)
        time.sleep(0.003)
    process.kill()
    raise AssertionError("the process was never in the middle of a line")


def test_no_event_of_two_processes_is_lost_or_torn(tmp_path: Path) -> None:
    """One finds the disk full in every line and is killed in the middle of one; the other's lines all fit."""
    log, expected = EventLog(tmp_path), []
    for attempt in range(4):
        command = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(attempt)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "started\n"
            expected.append((attempt, None))
            for step in range(25):
                log.append(Event.SLOW_STEPS, attempt, step=step)
                expected.append((attempt, step))
            stop_in_half_a_line(other, tmp_path / EVENTS_FILE)
            other.kill()
    assert [(event["attempt"], event.get("step")) for event in read_events(tmp_path)] == expected


def test_a_writer_that_was_stopped_keeps_no_other_from_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A watcher has to end a rank that is stopped, whatever that rank was about to do."""
    monkeypatch.setattr(json_lines, "LOCK_WAIT_S", 0.05)
    log, path = EventLog(tmp_path), tmp_path / EVENTS_FILE
    with path.open("r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        log.append(Event.FINISHED, 1, step=1)
        assert [event["step"] for event in read_events(tmp_path)] == [1]
        other.seek(0, os.SEEK_END)
        other.write(b'{"event')
        other.flush()
        before = path.read_bytes()
        log.append(Event.FINISHED, 1, step=2)
        assert path.read_bytes() == before  # else both lines would be lost
        assert "events.jsonl cannot be written (a stopped process" in capfd.readouterr().err
    log.append(Event.FINISHED, 1, step=3)
    assert [event["step"] for event in read_events(tmp_path)] == [1, 3]


def test_events_stand_in_the_file_as_ever(tmp_path: Path) -> None:
    """Byte for byte but for the time: what others read today they can read tomorrow."""
    m = a_monitor(tmp_path, attempt=2)
    m.event(Event.RESUMED, step=3, path="é", config_changed=["a"], precision_before=None)
    m.event(Event.LOSS_SPIKE, step=4, loss=math.nan, limit=0.1)
    watcher: Any = object.__new__(Watcher)
    watcher.run_dir, watcher.attempt = tmp_path, 2
    verdict = {"rank": 1, "host": "h", "cause": RankFailure.HOST_LOST, "reason": "é", "step": None}
    watcher._say(verdict | {"behind": [1]})
    times = [event["time"] for event in read_events(tmp_path)]
    assert (tmp_path / EVENTS_FILE).read_text() == "".join(
        f'{{"event": "{name}", "attempt": 2, "time": "{time}", {rest}}}\n'
        for name, time, rest in zip(
            ("monitoring", "resumed", "loss_spike", "rank_failed"),
            times,
            (
                '"flops_per_token": 60000000.0, "peak_flops_per_second": 1000000000000.0, "peak_source": '
                '"measured peak", "wandb": "disabled", "wandb_run_id": "abcd1234"',
                '"step": 3, "path": "\\u00e9", "config_changed": ["a"], "precision_before": null',
                '"step": 4, "loss": "NaN", "limit": 0.1',
                '"rank": 1, "host": "h", "cause": "lost", "reason": "\\u00e9", "step": null, "behind": [1]',
            ),
            strict=True,
        )
    )


@pytest.mark.parametrize(("step", "found"), [(10, True), (100, False), (1, False)])
def test_grep_finds_a_finished_run(tmp_path: Path, step: int, found: bool) -> None:
    log = EventLog(tmp_path)
    log.append(Event.STOPPED, 1, step=step, reason="SIGTERM")
    log.append(Event.FINISHED, 1, step=10)
    grep = ["grep", "-qsE", finished_pattern(step), str(tmp_path / EVENTS_FILE)]
    assert (subprocess.run(grep).returncode == 0) is found


def test_each_event_has_the_fields_that_are_listed_and_is_described() -> None:
    used: dict[str, set[str]] = {}
    for path in (ROOT / "pretrain").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            match call:
                case ast.Call(
                    func=ast.Attribute(attr="event" | "append"),
                    args=[ast.Attribute(value=ast.Name(id="Event"), attr=name), *_],
                    keywords=keywords,
                ):
                    used.setdefault(name, set()).update(word.arg for word in keywords if word.arg)
    assert used.keys() == Event.__members__.keys()
    described = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    for event in Event:
        assert used[event.name] <= set(event.fields)
        assert f"`{event}`" in described
    for event, source in (
        (Event.MICRO_BATCH_FOUND, FoundMicroBatch),
        (Event.CHUNK_SUBSTITUTED, Substitution),
        (Event.STRAGGLER, Straggler),
    ):
        assert {field.name for field in fields(source)} <= set(event.fields)


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
