"""A rank in trouble is named, all stacks are in the run folder, and all processes end. Real processes."""

from __future__ import annotations

import json
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from support.launching import Ranks

pytestmark = pytest.mark.integration
WORKER = "tests/support/workers/watchdog_worker.py"


def watchers_of(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # it ends while it is looked at
            found += [
                c for c in process.children(recursive=True) if "pretrain.reliability.watcher" in c.cmdline()
            ]
    return found


def run_into(trouble: str, victim: int, tmp_path: Path, n_ranks: int = 3) -> tuple[list[int], dict, str]:
    """Exit codes, the watchdog's event, and what was printed. Nothing is left running."""
    with Ranks(n_ranks, WORKER, str(tmp_path), trouble, str(victim), log_dir=tmp_path / "logs") as ranks:
        processes = [psutil.Process(p.pid) for p in ranks.processes]
        watchers: list[psutil.Process] = []
        deadline = time.monotonic() + 60
        while len(watchers) < n_ranks and time.monotonic() < deadline:
            watchers = watchers_of(processes)
            time.sleep(0.05)
        # Not `wait`, which kills what is left: here the watchers must end all by themselves.
        while any(p.poll() is None for p in ranks.processes) and time.monotonic() < deadline + 60:
            time.sleep(0.05)
        codes = [p.poll() for p in ranks.processes]
        output = ranks.output()
        assert None not in codes, f"still running\n{output}"
    assert len(watchers) == n_ranks
    _, alive = psutil.wait_procs(watchers, timeout=15)
    assert not alive, "a watcher is an orphan"
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert len(events) == 1, events
    return codes, events[0], output


def test_a_watcher_that_is_late_adds_no_verdict_to_that_of_the_hub(tmp_path: Path) -> None:
    """Rank 0 fails, and its watcher leaves, before the watcher of rank 1 has read that it is to join."""
    events = tmp_path / "events.jsonl"
    with Ranks(3, WORKER, str(tmp_path), "raises", "0", log_dir=tmp_path / "logs") as ranks:
        processes = [psutil.Process(p.pid) for p in ranks.processes]
        deadline = time.monotonic() + 60
        while not (found := watchers_of(processes[1:2])) and time.monotonic() < deadline:
            time.sleep(0.02)
        found[0].suspend()
        hub = watchers_of(processes[:1])
        while not events.exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        processes[1].suspend()  # or it would end by itself, as rank 0 is gone
        psutil.wait_procs(hub, timeout=30)
        found[0].resume()
        ranks.wait(60)
    recorded = [json.loads(line) for line in events.read_text().splitlines()]
    assert [(event["rank"], event["cause"], event["attempt"]) for event in recorded] == [(0, "error", 7)]


@pytest.mark.parametrize(
    ("trouble", "cause"),
    [
        ("stopped", "stopped"),
        ("holds the interpreter lock", "hang"),
        ("sleeps", "hang"),
        ("killed", "killed"),
        ("segfault", "killed"),
        ("raises", "error"),
        ("its watcher is killed", "lost"),
    ],
)
@pytest.mark.parametrize(
    "victim", [0, pytest.param(1, marks=pytest.mark.long)]
)  # long: the hub hears of it likewise
def test_the_rank_in_trouble_is_named(trouble: str, cause: str, victim: int, tmp_path: Path) -> None:
    if trouble == "its watcher is killed" and victim == 0:
        victim = 2  # without the hub nobody knows more than that rank 0's watcher is gone: the test below
    codes, event, output = run_into(trouble, victim, tmp_path)
    assert (event["event"], event["rank"], event["cause"]) == ("rank_failed", victim, cause), output
    assert (event["behind"], event["attempt"]) == ([victim], 7)
    assert event["step"] == 5 or cause == "lost"  # what a lost watcher said last may be a second old
    assert all(code != 0 for code in codes)
    if trouble == "raises":
        assert event["reason"] == "RunError: the disk is gone"
    assert f"watchdog: rank {victim}" in output
    stacks = {path.stem: path.read_text() for path in (tmp_path / "stacks" / "attempt-007").iterdir()}
    # Those whose neighbor is gone may fail by themselves before their watchers have heard of it.
    ended_by_watchers = {f"rank-{rank:05d}" for rank in range(3) if codes[rank] == -signal.SIGKILL}
    assert ended_by_watchers <= set(stacks) | {f"rank-{victim:05d}"}
    if cause in ("stopped", "hang"):
        assert set(stacks) == ended_by_watchers == {f"rank-{rank:05d}" for rank in range(3)}
        assert "in get_into" in stacks[f"rank-{victim:05d}"]
        others = [text for name, text in stacks.items() if name != f"rank-{victim:05d}"]
        assert all("all_reduce" in text for text in others)


def test_a_skipped_collective_names_those_that_wait_for_it(tmp_path: Path) -> None:
    """Who goes on without the others is not behind: it has come further."""
    _, event, _ = run_into("skips a collective", 1, tmp_path)
    assert (event["cause"], event["behind"]) == ("hang", [0, 2])


def test_the_hub_itself_is_killed(tmp_path: Path) -> None:
    codes, event, _ = run_into("its watcher is killed", 0, tmp_path)
    assert (event["rank"], event["cause"]) == (0, "lost")
    # Rank 0 ends first, so the others may fail by themselves before their watchers end them.
    assert {codes[1], codes[2]} <= {1, -signal.SIGKILL}


@pytest.mark.parametrize("trouble", ["none", "is slow but gets on"])
def test_ranks_that_end_as_they_should_leave_no_trace(trouble: str, tmp_path: Path) -> None:
    """Also where the others wait for one longer than the limit, as they do for the end of a long save."""
    with Ranks(2, WORKER, str(tmp_path), trouble, "0", log_dir=tmp_path / "logs") as ranks:
        assert ranks.wait(60) == [0, 0], ranks.output()
    assert not (tmp_path / "events.jsonl").exists()
    assert not (tmp_path / "stacks").exists()
