"""Requests to stop, wherever they arrive, and a loss that goes wrong: whole runs in real processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from pretrain.checkpoint import tensors as checkpoint
from pretrain.reliability.heartbeat import LAUNCHER_LOST
from pretrain.reliability.journal import read_metrics
from support import ROOT
from support.launching import Ranks, free_port, run_ranks
from support.tiny import GLOBAL_BATCH, TinyCorpus, events, make_corpus, run_arguments
from support.training import losses, samples_by_step, steps_done, wait_for

pytestmark = pytest.mark.integration
TRAIN = "launch/train.py"


# ---- requests to stop ------------------------------------------------------------------------------------------------


@contextmanager
def launched(arguments: list[str], log: Path) -> Iterator[dict[str, list[psutil.Process]]]:
    """A run under the real launcher: its processes by kind, ranks last. Nothing is left when the block ends."""
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), TRAIN, *arguments]
    with log.open("w") as output:
        root = psutil.Process(
            subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output, stderr=output
            ).pid
        )
    tree: dict[str, list[psutil.Process]] = {"deepspeed": [root], "launch": [], "rank": []}
    try:
        deadline = time.monotonic() + 60
        while len(tree["rank"]) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
            below = root.children(recursive=True)
            lines, parents = {}, {}
            for process in below:
                with suppress(psutil.Error):  # it has ended meanwhile
                    lines[process], parents[process] = " ".join(process.cmdline()), process.ppid()
            tree["launch"] = [p for p, line in lines.items() if "deepspeed.launcher.launch" in line]
            tree["rank"] = (
                [p for p in parents if parents[p] == tree["launch"][0].pid] if tree["launch"] else []
            )
        yield tree
    finally:
        for process in [*tree["rank"], *tree["launch"], root]:
            if process.is_running():
                process.kill()


@pytest.mark.parametrize(
    ("victim", "number", "reason"),
    [
        # Long: the launcher is lost, as by SIGKILL below.
        pytest.param("deepspeed", signal.SIGTERM, LAUNCHER_LOST, marks=pytest.mark.long),
        ("deepspeed", signal.SIGKILL, LAUNCHER_LOST),
        ("launch", signal.SIGTERM, "SIGTERM"),
        pytest.param("launch", signal.SIGUSR1, LAUNCHER_LOST, marks=pytest.mark.long),
        ("rank", signal.SIGUSR1, "SIGUSR1"),
    ],
)
def test_a_signal_to_any_process_of_the_launcher_saves_and_stops(
    corpus: TinyCorpus, tmp_path: Path, victim: str, number: signal.Signals, reason: str
) -> None:
    run_dir = tmp_path / "run"
    arguments = run_arguments(corpus, run_dir, "total_steps=5000", "checkpoint.every_steps=4000")
    with launched(arguments, tmp_path / "log") as tree:
        deadline = time.monotonic() + 120
        while steps_done(run_dir) < 3:
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
        tree[victim][-1].send_signal(
            number
        )  # of the ranks the last, which is not the one that writes the event
        _, alive = psutil.wait_procs(tree["rank"], timeout=60)
        assert not alive, "orphans"
    stopped = events(run_dir)[-1]
    assert (stopped["event"], stopped["reason"]) == ("stopped", reason), (tmp_path / "log").read_text()
    found = checkpoint.find_latest(run_dir)
    assert found.path == checkpoint.checkpoint_path(run_dir, stopped["step"])
    assert stopped["step"] == read_metrics(run_dir)[-1]["step"]  # no step is lost


def test_a_signal_while_starting_ends_with_75_before_the_first_step(
    corpus: TinyCorpus, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with Ranks(2, TRAIN, *run_arguments(corpus, run_dir), log_dir=tmp_path / "first") as ranks:
        wait_for((run_dir / "lock").exists, ranks)
        ranks.processes[1].send_signal(signal.SIGTERM)
        codes = ranks.wait()
    assert codes == [75, 75], ranks.output()
    assert steps_done(run_dir) == 0
    assert [e["event"] for e in events(run_dir)][-2:] == ["started", "stopped"]
    run_ranks(2, TRAIN, *run_arguments(corpus, run_dir), log_dir=tmp_path / "second")


def test_a_request_within_a_long_step_gives_the_step_up(corpus: TinyCorpus, tmp_path: Path) -> None:
    """512 micro batches in a step: it is left at the next one, and what is saved is the step before."""
    run_dir = tmp_path / "run"
    long = [
        "global_batch_sequences=1024",
        "micro_batch_sequences=1",
        "total_steps=3",
        "checkpoint.every_steps=3",
    ]
    with Ranks(2, TRAIN, *run_arguments(corpus, run_dir, *long), log_dir=tmp_path / "first") as ranks:
        wait_for(lambda: steps_done(run_dir) >= 1, ranks)
        time.sleep(1)  # some micro batches into the second step
        ranks.processes[1].send_signal(signal.SIGTERM)
        codes = ranks.wait()
    assert codes == [75, 75], ranks.output()
    assert events(run_dir)[-1]["step"] == steps_done(run_dir) == 1
    assert checkpoint.find_latest(run_dir).path == checkpoint.checkpoint_path(run_dir, 1)


def test_a_known_end_of_the_allocation(corpus: TinyCorpus, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = run_arguments(corpus, run_dir, "total_steps=100000", "stop_after_s=15")
    with Ranks(1, TRAIN, *arguments, log_dir=tmp_path / "logs") as ranks:
        assert ranks.wait() == [75], ranks.output()
    assert events(run_dir)[-1]["reason"] == "stop_after_s=15.0"
    # On a slow machine the time may be over before the first step; then there is nothing to save.
    assert (checkpoint.find_latest(run_dir).path is None) == (steps_done(run_dir) == 0)


# ---- a loss that goes wrong ------------------------------------------------------------------------------------------

# A learning rate that teaches nothing leaves a noisy loss, and a low bar makes its natural peaks spikes. The text is
# fixed: with this project's own sources each edit would move the peaks.
NOISY = ["schedule=constant", "optim.lr=1e-6", "checkpoint.every_steps=2", "loss_guard.window_steps=4"]
NOISY += ["loss_guard.spike_sigmas=0.5", "loss_guard.pass_over_steps=1", "loss_guard.max_rollbacks=60"]


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    """Words drawn at random, a few of them often in one document and never in another."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(2000)]
    documents = []
    for number in range(60):
        favorites = draw.sample(words, 40)
        lines = [" ".join(draw.choices(favorites, k=10)) for _ in range(80)]
        documents.append((str(number), "\n".join(lines) + "\n"))
    return make_corpus(tmp_path_factory.mktemp("noise"), documents=documents)


def assert_samples_are_the_rest(run_dir: Path) -> None:
    """Each sample once, but those of the journalled windows not at all."""
    passed_over = checkpoint.read_state(checkpoint.find_latest(run_dir).path)["order"]["passed_over"]
    left_out = {sample for first, end in passed_over for sample in range(first, end)}
    steps = samples_by_step(run_dir)
    assert sorted(steps) == list(range(1, 13))
    used = [sample for step in sorted(steps) for sample in steps[step]]
    expected = [s for s in range(12 * GLOBAL_BATCH + len(left_out)) if s not in left_out]
    assert used == expected[: len(used)]
    assert len(used) == 12 * GLOBAL_BATCH


def test_spikes_roll_back_and_pass_over_alike_with_and_without_a_kill(
    noise: TinyCorpus, tmp_path: Path
) -> None:
    def arguments(name: str) -> list[str]:
        return run_arguments(noise, tmp_path / name, *NOISY, "loss_guard.on_spike=rollback")

    run_ranks(2, TRAIN, *arguments("straight"), log_dir=tmp_path / "logs")
    rolled = [e for e in events(tmp_path / "straight") if e["event"] == "rolled_back"]
    assert rolled
    for event in rolled:
        assert event["step"] < event["from_step"]
        assert event["passed_over_samples"][1] - event["passed_over_samples"][0] == GLOBAL_BATCH
    assert_samples_are_the_rest(tmp_path / "straight")

    with Ranks(2, TRAIN, *arguments("killed"), log_dir=tmp_path / "first") as ranks:
        happened = lambda: any(  # noqa: E731
            e["event"] == "rolled_back"
            for e in (events(tmp_path / "killed") if (tmp_path / "killed/events.jsonl").exists() else [])
        )
        wait_for(happened, ranks)
        ranks.processes[1].kill()
        ranks.wait()
    run_ranks(2, TRAIN, *arguments("killed"), log_dir=tmp_path / "second")
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    assert_samples_are_the_rest(tmp_path / "killed")


def test_spikes_are_skipped(noise: TinyCorpus, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_ranks(2, TRAIN, *run_arguments(noise, run_dir, *NOISY), log_dir=tmp_path / "logs")
    spikes = [e["step"] for e in events(run_dir) if e["event"] == "loss_spike"]
    records = read_metrics(run_dir)
    assert spikes
    assert [r["step"] for r in records if r["skipped"]] == spikes
    assert all(r["loss"] < 10 for r in records)
    state = checkpoint.read_state(checkpoint.find_latest(run_dir).path)
    assert state["optimizer_step"] == 12 - len(spikes)


def test_too_many_rollbacks_end_the_run_with_2(noise: TinyCorpus, tmp_path: Path) -> None:
    more = [*NOISY, "loss_guard.on_spike=rollback", "loss_guard.max_rollbacks=0"]
    with Ranks(1, TRAIN, *run_arguments(noise, tmp_path / "run", *more), log_dir=tmp_path / "logs") as ranks:
        codes = ranks.wait()
    assert codes == [2], ranks.output()
    assert "the run diverges at step" in ranks.output()
    assert "Traceback" not in ranks.output()
