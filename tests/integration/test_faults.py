"""Faults from below: the kernel refuses, kills, runs out of memory, or tells another time. One test or more per row.

Saves of checkpoints are made by save_worker.py under strace, which kills or fails them at the k-th system call;
training is real. Row 10 (damaged checkpoints): also test_checkpoint and test_training. Row 19 (two jobs, one run_dir)
and row 21 (another configuration, other data): test_training.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint import tensors as checkpoint
from pretrain.checkpoint.tensors import find_latest
from pretrain.config import TrainConfig, load_config
from pretrain.corpus.manifest import load_manifest
from pretrain.reliability.journal import read_ledger, read_metrics
from pretrain.reliability.json_lines import read_lines
from pretrain.train.run_folder import write_run_files
from support import ROOT
from support.checkpoints import read_tensors
from support.gate import Gate
from support.launching import Ranks, free_port, loader_workers
from support.tiny import GLOBAL_BATCH, TinyCorpus, events, run_arguments, train_tokenizer
from support.training import assert_equals_undisturbed, samples_by_step, steps_done, wait_for
from support.workers.save_worker import SHAPES

TRAIN = "launch/train.py"

CHANGES = (
    "write,pwrite64,writev,ftruncate,fsync,fdatasync,rename,renameat,renameat2,mkdir,mkdirat,"
    "unlink,unlinkat,rmdir"
)
"""System calls that change what is on a disk."""


# ---- saves under strace ----------------------------------------------------------------------------------------------


class SaveWorker:
    """tests/support/workers/save_worker.py, and strace at its forks."""

    def __init__(self, **env: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "tests/support/workers/save_worker.py"],
            cwd=ROOT,
            env={**os.environ, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def save(self, run_dir: Path, step: int, *strace: str, keep_last: int = 9) -> int:
        """Exit code of a save, or minus the signal that ended it. `strace`: options to trace it with."""
        self.process.stdin.write(f"{run_dir} {step} {keep_last} {int(bool(strace))}\n")
        self.process.stdin.flush()
        tracer = None
        pid = self.process.stdout.readline().split()[1]
        if strace:
            tracer = subprocess.Popen(["strace", "-f", *strace, "-p", pid], stderr=subprocess.DEVNULL)
        code = int(self.process.stdout.readline().split()[1])
        if tracer is not None:
            tracer.wait()
        return code

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def worker() -> Iterator[SaveWorker]:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed (tests/install_system.sh does)")
    started = SaveWorker()
    yield started
    started.close()


def assert_usable(run_dir: Path, step: int) -> None:
    """The newest checkpoint is that of `step`, and holds what was saved."""
    path = checkpoint.checkpoint_path(run_dir, step)
    assert find_latest(run_dir).path == path
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    for name, shape in SHAPES.items():
        assert torch.equal(tensors[f"weight.{name}"], torch.full(shape, float(step)))


def damage_newest(run_dir: Path) -> None:
    newest = checkpoint.list_checkpoints(run_dir)[-1]
    next(newest.glob("*.safetensors")).write_bytes(b"")


@dataclass
class Call:
    """One line of strace -y."""

    name: str
    path: str
    nth: int
    """How many calls of that name there were, with this one: what strace's `when=` counts."""


def traced_calls(log: Path) -> list[Call]:
    calls: list[Call] = []
    for line in log.read_text().splitlines():
        found = re.match(r"\d+ +(\w+)\((?:\d+<([^>]*)>|[^\"]*\"([^\"]*)\")", line)
        if found is not None:
            nth = sum(call.name == found[1] for call in calls) + 1
            calls.append(Call(found[1], found[2] or found[3], nth))
    return calls


def calls_of_a_save(worker: SaveWorker, before: Path, tmp_path: Path) -> list[Call]:
    """What a save of step 2 does in a copy of the run folder `before`, if nothing disturbs it."""
    run_dir, log = Path(shutil.copytree(before, tmp_path / "undisturbed")), tmp_path / "calls"
    assert worker.save(run_dir, 2, "-y", "-e", f"trace={CHANGES}", "-o", str(log)) == 0
    calls = traced_calls(log)
    assert {"mkdir", "write", "fsync", "rename"} <= {call.name for call in calls}
    return calls


@pytest.mark.parametrize("over", ["nothing", "a damaged one"])
def test_row_11_sigkill_at_every_kth_write_fsync_rename(
    worker: SaveWorker, tmp_path: Path, over: str
) -> None:
    before = tmp_path / "before"
    assert worker.save(before, 1) == 0
    if over != "nothing":  # a checkpoint that was refused at the start is replaced
        assert worker.save(before, 2) == 0
        damage_newest(before)
    found = []
    calls = calls_of_a_save(worker, before, tmp_path)
    for number, call in enumerate(calls):
        run_dir = Path(shutil.copytree(before, tmp_path / str(number)))
        inject = f"inject={call.name}:signal=SIGKILL:when={call.nth}"
        code = worker.save(run_dir, 2, "-e", f"trace={CHANGES}", "-e", inject, "-o", os.devnull)
        assert code == -signal.SIGKILL
        survived = find_latest(run_dir)
        assert survived.path is not None, survived.passed_over
        found.append(checkpoint.step_of(survived.path))
        assert_usable(run_dir, found[-1])
        assert worker.save(run_dir, 3) == 0  # over whatever the killed one left
        assert_usable(run_dir, 3)
    published = next(i for i, call in enumerate(calls) if call.name.startswith("rename")) + 1
    assert found == [1] * published + [2] * (len(calls) - published)
    assert published < len(calls)  # the folder is synced after the rename


def test_sigkill_at_every_kth_call_of_thinning(worker: SaveWorker, tmp_path: Path) -> None:
    """The checkpoint is whole or thinned after each, all its hashes match, and thinning again completes it."""
    before, log = tmp_path / "before", tmp_path / "log"
    assert worker.save(before, 1) == 0
    undisturbed = Path(shutil.copytree(before, tmp_path / "undisturbed"))
    assert worker.save(undisturbed, 1, "-y", "-e", f"trace={CHANGES}", "-o", str(log), keep_last=0) == 0
    calls = traced_calls(log)
    exchanged = next(i for i, call in enumerate(calls) if call.name == "renameat2")
    found = []
    for number, call in enumerate(calls):
        run_dir = Path(shutil.copytree(before, tmp_path / str(number)))
        inject = f"inject={call.name}:signal=SIGKILL:when={call.nth}"
        traced = ("-e", f"trace={CHANGES}", "-e", inject, "-o", os.devnull)
        assert worker.save(run_dir, 1, *traced, keep_last=0) == -signal.SIGKILL
        assert_usable(run_dir, 1)
        survived = find_latest(run_dir).verified
        moments = {key for key in read_tensors(survived.path) if key.startswith("exp_avg")}
        is_thin = survived.state.get("weights_only") == "fp32"
        assert moments == (set() if is_thin else {f"exp_avg.{name}" for name in SHAPES})
        found.append(is_thin)
        if not is_thin:
            assert worker.save(run_dir, 1, keep_last=0) == 0
            assert_usable(run_dir, 1)
            assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000001"]
    assert found == [False] * (exchanged + 1) + [True] * (len(calls) - exchanged - 1)
    assert exchanged < len(calls) - 1


def test_row_11_sigkill_at_every_kth_deletion_of_an_old_checkpoint(
    worker: SaveWorker, tmp_path: Path
) -> None:
    before, log = tmp_path / "before", tmp_path / "log"
    assert worker.save(before, 1) == 0
    undisturbed = Path(shutil.copytree(before, tmp_path / "undisturbed"))
    assert worker.save(undisturbed, 2, "-y", "-e", f"trace={CHANGES}", "-o", str(log), keep_last=1) == 0
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(undisturbed)] == [2]
    deletions = [
        c
        for c in traced_calls(log)
        if c.name in ("unlink", "unlinkat", "rmdir") and "step-00000001" in c.path
    ]
    assert len(deletions) == 4  # COMPLETE, tensors, state.json, the folder
    old_is_whole = []
    for number, call in enumerate(deletions):
        run_dir = Path(shutil.copytree(before, tmp_path / str(number)))
        inject = f"inject={call.name}:signal=SIGKILL:when={call.nth}"
        trace = ["-e", f"trace={CHANGES}", "-e", inject, "-o", os.devnull]
        assert worker.save(run_dir, 2, *trace, keep_last=1) == -signal.SIGKILL
        assert_usable(run_dir, 2)
        old_is_whole.append(checkpoint.verify(checkpoint.checkpoint_path(run_dir, 1)) is None)
        assert worker.save(run_dir, 3, keep_last=1) == 0
        assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(run_dir)] == [3]
        assert_usable(run_dir, 3)
    assert old_is_whole == [True, False, False, False]  # it ceases to be one at once


def unsynced(calls: list[Call], run_dir: Path, step: int) -> list[str]:
    """What a power failure could lose of a checkpoint, or leave half there, after it has been published."""
    final = str(checkpoint.checkpoint_path(run_dir, step))
    (renamed,) = (i for i, call in enumerate(calls) if call.name.startswith("rename"))
    folder = calls[renamed].path
    synced = {c.path: i for i, c in enumerate(calls[:renamed]) if c.name in ("fsync", "fdatasync")}
    written = {c.path: i for i, c in enumerate(calls) if "write" in c.name and c.path.startswith(folder)}
    assert any(path.endswith("COMPLETE") for path in written)
    problems = [path for path, at in written.items() if synced.get(path, -1) < at]
    if synced.get(folder, -1) < max(written.values()):
        problems.append(folder)
    if not any(c.name == "fsync" and c.path == str(Path(final).parent) for c in calls[renamed:]):
        problems.append(str(Path(final).parent))
    return problems


@pytest.mark.parametrize("fsync", ["at work", "disabled"])
def test_row_11_all_is_synced_before_it_is_published(tmp_path: Path, worker: SaveWorker, fsync: str) -> None:
    """A kill loses nothing that was written; a power failure loses what was not synced. And the check would see it."""
    saver = worker if fsync == "at work" else SaveWorker(NO_FSYNC="1")
    run_dir, log = tmp_path / "run", tmp_path / "log"
    assert saver.save(run_dir, 1) == 0
    assert saver.save(run_dir, 2, "-y", "-e", f"trace={CHANGES}", "-o", str(log)) == 0
    problems = unsynced(traced_calls(log), run_dir, 2)
    if fsync == "at work":
        assert problems == []
    else:
        saver.close()
        assert len(problems) == 5  # tensors, state.json, COMPLETE, and both folders


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        ("write", "ENOSPC", "No space left on device"),
        ("write", "EDQUOT", "Disk quota exceeded"),
        ("write fsync rename", "EIO", "Input/output error"),
        ("mkdir rename", "EROFS", "Read-only file system"),
    ],
)
def test_row_12_a_save_that_the_disk_refuses(
    worker: SaveWorker, tmp_path: Path, names: str, error: str, words: str
) -> None:
    """At every call that may fail: a sentence, the last good one stays, nothing half-written, the next one works."""
    before = tmp_path / "before"
    assert worker.save(before, 1) == 0
    calls = [call for call in calls_of_a_save(worker, before, tmp_path) if call.name in names.split()]
    assert {call.name for call in calls} == set(names.split())
    for number, call in enumerate(calls):
        run_dir = Path(shutil.copytree(before, tmp_path / str(number)))
        inject = f"inject={call.name}:error={error}:when={call.nth}"
        code = worker.save(run_dir, 2, "-e", f"trace={CHANGES}", "-e", inject, "-o", os.devnull)
        if call.name == "mkdir" and call.nth > 1:  # of a folder that is there already
            assert code == 0
            assert_usable(run_dir, 2)
            continue
        assert code == 1
        sentence = Path(f"{run_dir}.error").read_text()
        assert words in sentence
        assert "\n" not in sentence
        published = checkpoint.checkpoint_path(run_dir, 2).exists()
        assert_usable(run_dir, 2 if published else 1)
        assert not list((run_dir / "checkpoints").glob(".*"))
        assert worker.save(run_dir, 3) == 0
        assert_usable(run_dir, 3)


# ---- training --------------------------------------------------------------------------------------------------------


def train_once(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, TRAIN, *arguments],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize("content", ["", "{", "[]", '{"run_id": "x"}'])
def test_row_10_a_damaged_pointer_is_made_again_from_the_checkpoint(
    corpus: TinyCorpus, tmp_path: Path, content: str
) -> None:
    """run.json says which run and attempt this is; the state in the newest good checkpoint knows both, too."""
    config = load_config(TrainConfig, run_arguments(corpus, tmp_path), "config")
    manifest = load_manifest(corpus.manifest)
    given = (manifest.tokenizer_sha256, {str(corpus.manifest): manifest})
    before = write_run_files(config, tmp_path, None, *given)
    (tmp_path / "run.json").write_text(content)
    expected = before | {"attempt": before["attempt"] + 1}
    assert write_run_files(config, tmp_path, before, *given) == expected
    assert json.loads((tmp_path / "run.json").read_text()) == expected


@pytest.mark.integration
def test_row_12_records_on_a_full_disk_do_not_stop_training(corpus: TinyCorpus, tmp_path: Path) -> None:
    """Each record is a file of its own on a disk that is full; the checkpoint beside them is not."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    run_dir, disk = tmp_path / "run", tmp_path / "disk"
    records = [run_dir / "metrics.jsonl", run_dir / "events.jsonl", run_dir / "ledger" / "rank-00000.jsonl"]
    disk.mkdir()
    mounted = [disk]
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)], check=True)
    try:
        for path in records:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            (disk / path.name).touch()
            subprocess.run(["mount", "--bind", str(disk / path.name), str(path)], check=True)
            mounted.append(path)
        (disk / "filling").write_bytes(bytes(4096))
        result = train_once(*run_arguments(corpus, run_dir, "total_steps=3"))
    finally:
        for path in reversed(mounted):
            subprocess.run(["umount", str(path)], check=True)
    assert result.returncode == 0, result.stderr
    for path in records:
        warning = f"warning: {path} cannot be written (No space left on device)"
        assert result.stderr.count(warning) == 1
    assert find_latest(run_dir).path == checkpoint.checkpoint_path(run_dir, 3)


@pytest.mark.integration
def test_row_12_a_read_only_run_folder_is_one_sentence(corpus: TinyCorpus, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a read-only file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)], check=True)
    try:
        result = train_once(*run_arguments(corpus, disk / "run"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert result.returncode == 1
    (sentence,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert "Read-only file system" in sentence
    assert "Traceback" not in result.stderr


FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")


@pytest.mark.integration
def test_row_14_the_clock_of_one_rank_jumps_an_hour_forth_and_back(
    corpus: TinyCorpus, straight: Path, tmp_path: Path
) -> None:
    """No false timeout, and the same run bit for bit. The monotonic clock goes on, as it does on a host that is set."""
    if not FAKETIME.exists():
        pytest.skip("libfaketime is not installed (tests/install_system.sh does)")
    run_dir, clock = tmp_path / "run", tmp_path / "clock"
    clock.write_text("+0")
    fake = {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_FORCE_MONOTONIC_FIX": "0",  # a remedy for glibc before 2.30 that spins on newer ones
    }
    offsets = {"step-3": "+3600", "step-6": "-3600", "step-9": "+0"}
    gate, arguments = Gate(tmp_path / "gate", *offsets), run_arguments(corpus, run_dir)
    with Ranks(2, TRAIN, *arguments, log_dir=tmp_path / "logs", env=gate.env, env_of={0: fake}) as ranks:
        for place, offset in offsets.items():
            wait_for(lambda place=place: gate.reached(place), ranks)
            clock.write_text(offset)
            gate.open(place)
        codes = ranks.wait()
    assert codes == [0, 0], ranks.output()
    assert_equals_undisturbed(run_dir, straight)
    stamps = [datetime.fromisoformat(record["time"]) for record in read_lines(run_dir / "metrics.jsonl")]
    jumps = [(b - a).total_seconds() for a, b in itertools.pairwise(stamps)]
    assert max(jumps) > 3000  # the clock was another, and the files show it
    assert min(jumps) < -3000


@pytest.fixture
def memory_limit() -> Iterator[Callable[[int, int], Path]]:
    """Put a process into a memory cgroup of so many bytes: at the next page beyond it the kernel kills it."""
    group = Path("/sys/fs/cgroup/memory") / f"pretrain-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup (version 1) can be made here: {error.strerror}")

    def limit(process: int, n_bytes: int) -> Path:
        (group / "memory.limit_in_bytes").write_text(str(n_bytes))
        (group / "cgroup.procs").write_text(str(process))
        return group / "memory.oom_control"

    yield limit
    deadline = time.monotonic() + 20
    while (group / "cgroup.procs").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    group.rmdir()


@pytest.mark.integration
@pytest.mark.alone  # the kernel counts such kills for the whole host
def test_row_15_a_loader_worker_out_of_memory_is_named(
    corpus: TinyCorpus, tmp_path: Path, memory_limit: Callable[[int, int], Path]
) -> None:
    """The kernel's own out-of-memory killer ends the worker, which has no more pages to get."""
    arguments = run_arguments(corpus, tmp_path / "run", "data.loader_workers=1", "total_steps=5000")
    with Ranks(1, TRAIN, *arguments, "checkpoint.every_steps=5000", log_dir=tmp_path / "logs") as ranks:
        wait_for(lambda: steps_done(tmp_path / "run") >= 2, ranks)
        (reader,) = loader_workers(ranks.processes[0].pid)
        told = memory_limit(reader, 1 << 16)
        (code,) = ranks.wait(60)
    output = ranks.output()
    assert "oom_kill 1\n" in told.read_text()
    assert code == 1, output
    (sentence,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert "a process that reads training data died" in sentence
    assert "out of memory" in sentence


@pytest.mark.integration
def test_row_15_a_trainer_out_of_memory_is_named(corpus: TinyCorpus, tmp_path: Path) -> None:
    """An address space too small for the model: the allocation fails, and its error is what the log ends with."""
    limited = 'ulimit -v 6000000; exec "$0" "$@"'
    arguments = run_arguments(corpus, tmp_path / "run", "model.d_model=4096", "model.d_ff=65536")
    result = subprocess.run(
        ["bash", "-c", limited, sys.executable, TRAIN, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1, result.stderr
    (failed,) = (event for event in events(tmp_path / "run") if event["event"] == "rank_failed")
    assert failed["cause"] == "oom", result.stderr
    assert re.search(r"watchdog: rank 0.*: oom: .*allocate memory", result.stderr)


@pytest.mark.integration
@pytest.mark.alone  # the kernel counts such kills for the whole host
def test_row_15_a_trainer_that_the_kernel_kills_for_memory_is_named(
    corpus: TinyCorpus, tmp_path: Path, memory_limit: Callable[[int, int], Path]
) -> None:
    run_dir = tmp_path / "run"
    arguments = run_arguments(corpus, run_dir, "total_steps=5000", "checkpoint.every_steps=5000")
    with Ranks(2, TRAIN, *arguments, log_dir=tmp_path / "logs") as ranks:
        wait_for(lambda: steps_done(run_dir) >= 2, ranks)
        told = memory_limit(ranks.processes[1].pid, 1 << 16)
        codes = ranks.wait(60)
    assert "oom_kill 1\n" in told.read_text()
    assert codes[1] == -signal.SIGKILL, ranks.output()
    assert codes[0] not in (0, 2, 75)  # killed by its watcher, or failed when its neighbor was gone
    (failed,) = (event for event in events(run_dir) if event["event"] == "rank_failed")
    assert (failed["rank"], failed["cause"]) == (1, "oom")


@pytest.mark.integration
def test_row_16_a_killed_loader_worker_ends_the_run_with_a_sentence(
    corpus: TinyCorpus, tmp_path: Path
) -> None:
    """On every rank, soon, and naming what died."""
    arguments = run_arguments(corpus, tmp_path / "run", "data.loader_workers=1", "total_steps=5000")
    with Ranks(2, TRAIN, *arguments, "checkpoint.every_steps=5000", log_dir=tmp_path / "logs") as ranks:
        wait_for(lambda: steps_done(tmp_path / "run") >= 2, ranks)
        (reader,) = loader_workers(ranks.processes[1].pid)
        os.kill(reader, signal.SIGKILL)
        codes = ranks.wait(60)
    assert codes[1] == 1, ranks.output()
    assert codes[0] not in (0, 2, 75)
    (sentence,) = (line for line in ranks.logs[1].read_text().splitlines() if line.startswith("error: "))
    assert "rank 1: a process that reads training data died" in sentence


@pytest.mark.integration
def test_row_16_a_stopped_loader_worker_does_not_hold_the_run_for_ever(
    corpus: TinyCorpus, tmp_path: Path
) -> None:
    """Nothing dies, nothing answers: the watchdog ends the run within its limit and names the rank and the phase."""
    run_dir = tmp_path / "run"
    endless = ["total_steps=5000", "checkpoint.every_steps=5000", "evaluation.every_steps=5000"]
    arguments = run_arguments(corpus, run_dir, "data.loader_workers=1", "watchdog.step_s=4", *endless)
    with Ranks(2, TRAIN, *arguments, log_dir=tmp_path / "logs") as ranks:
        wait_for(lambda: steps_done(run_dir) >= 2, ranks)
        (reader,) = loader_workers(ranks.processes[1].pid)
        os.kill(reader, signal.SIGSTOP)
        codes = ranks.wait(60)
        assert codes == [-signal.SIGKILL] * 2, ranks.output()
    (failed,) = (event for event in events(run_dir) if event["event"] == "rank_failed")
    assert (failed["rank"], failed["cause"], failed["behind"]) == (1, "hang", [1])
    assert "phase data" in failed["reason"]
    (stacks,) = (run_dir / "stacks").glob("attempt-*/rank-00001.txt")
    assert "loader.py" in stacks.read_text()  # where it waits


@pytest.mark.integration
def test_row_16_an_unreachable_wandb_does_not_stop_training(corpus: TinyCorpus, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = run_arguments(
        corpus, run_dir, "total_steps=6", "checkpoint.every_steps=6", "logging.wandb=online"
    )
    key = {
        "WANDB_API_KEY": "0" * 40,
        "WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}",
        "WANDB_MODE": "online",
    }
    result = train_once(*arguments, **key)
    assert result.returncode == 0, result.stderr
    names = [event["event"] for event in events(run_dir)]
    assert "wandb_failed" in names
    assert names[-1] == "finished" or names[-2] == "finished"
    # W&B was still trying to connect, which takes it 30 s, when the last step was done.
    assert sum(record["step_time_s"] for record in read_metrics(run_dir)[1:]) < 25


@pytest.mark.integration
@pytest.mark.long  # ten starts of a rank; 2 to 1 ranks and back in test_training.py
def test_row_20_4_to_2_to_4_ranks_give_the_same_sequence_of_samples(
    corpus: TinyCorpus, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    for ranks, stop in ((4, 2), (2, 4), (4, None)):
        extra = [f"stop_at_step={stop}"] if stop else []
        arguments = run_arguments(corpus, run_dir, "total_steps=6", "evaluation.every_steps=99", *extra)
        with Ranks(ranks, TRAIN, *arguments, log_dir=tmp_path / f"logs-{stop}") as processes:
            codes = processes.wait()
        assert codes == [75 if stop else 0] * ranks, processes.output()
    steps = samples_by_step(run_dir)
    assert sorted(steps) == [1, 2, 3, 4, 5, 6]
    assert [s for step in sorted(steps) for s in steps[step]] == list(range(6 * GLOBAL_BATCH))
    assert [len({e["rank"] for e in read_ledger(run_dir) if e["step"] == step}) for step in (2, 4, 6)] == [
        4,
        2,
        4,
    ]


@pytest.mark.integration
def test_row_21_another_tokenizer_at_resume_is_refused(
    corpus: TinyCorpus, straight: Path, tmp_path: Path
) -> None:
    """Another configuration and other data: test_training, test_another_*_is_refused."""
    changed = TinyCorpus(Path(shutil.copytree(corpus.folder, tmp_path / "corpus")))
    run_dir = Path(shutil.copytree(straight, tmp_path / "run"))
    was = (run_dir / "tokenizer.model").read_bytes()
    train_tokenizer(tmp_path / "other", ["another text " * 50, "0123456789 abcdefghijkl"], 300)
    shutil.copy(tmp_path / "other" / "tokenizer.model", changed.folder / "tokenizer.model")
    result = train_once(*run_arguments(changed, run_dir, "total_steps=13"))
    assert result.returncode == 2, result.stderr
    (sentence,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert f"the tokenizer {changed.folder}/tokenizer.model has sha256" in sentence
    assert (run_dir / "tokenizer.model").read_bytes() == was
