"""Starts and watches a small run on two hosts of one rank each, and compares it with the undisturbed run."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pretrain.checkpoint import tensors as checkpoint
from pretrain.reliability.journal import read_ledger, read_metrics
from pretrain.reliability.json_lines import read_lines
from support import ROOT
from support.checkpoints import assert_same_state
from support.cluster.hosts import Cluster, wait_until
from support.tiny import GLOBAL_BATCH, TinyCorpus, run_arguments

N_STEPS = 80
"""Number of steps. They take a few seconds, which is long enough for a fault in the middle."""
SAVE_EVERY_STEPS = 20
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "PYTHONUNBUFFERED": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
}
"""Environment of the commands that submit or start a run. The Python that runs the tests comes first on the path."""
SITE = [
    f"cluster.{setting}"
    for setting in "nodes=2 gpus_per_node=0 ranks_per_node=1 cpus_per_rank=1 network_interface=eth0 time_limit=0:30:00 "
    "stop_before_end_s=60 preflight.min_tmpdir_gib=0.1 preflight.min_run_dir_gib=0.5 preflight.min_memory_gib=0.5 "
    "preflight.min_write_mib_per_second=2 preflight.min_network_mib_per_second=20 preflight.check_timeout_s=30".split()
]
"""Overrides that describe the cluster to launch/submit.py, with limits that a busy machine can meet."""
LIVE_STATES = {"PENDING", "CONFIGURING", "RUNNING", "SIGNALING", "COMPLETING", "REQUEUED", None}
"""States of a job that may still make progress. None means that slurmctld did not answer."""


def arguments(corpus: TinyCorpus, run_dir: Path, *more: str) -> list[str]:
    """Overrides for the run: the tiny run, but longer, with a checkpoint every 20 steps."""
    own = [f"total_steps={N_STEPS}", f"checkpoint.every_steps={SAVE_EVERY_STEPS}"]
    return run_arguments(corpus, run_dir, *own, "evaluation.every_steps=1000", "engine.timeout_s=120", *more)


class SlurmRun:
    """One run folder and its jobs, which launch/submit.py submits from the head."""

    def __init__(self, cluster: Cluster, corpus: TinyCorpus, run_dir: Path) -> None:
        self.cluster = cluster
        self.corpus = corpus
        self.run_dir = run_dir

    def submit(self, *more: str, expect: int = 0) -> str:
        """Run `python launch/submit.py cluster=slurm ...`. Returns its output."""
        words = [sys.executable, str(ROOT / "launch" / "submit.py"), "cluster=slurm", *SITE]
        environment = ENVIRONMENT | {"TMPDIR": str(self.cluster.folder / "local")}
        done = self.cluster.head.run(
            *words, *arguments(self.corpus, self.run_dir, *more), cwd=ROOT, env=environment, check=False
        )
        assert done.returncode == expect, done.stdout
        return done.stdout

    def submit_job(self, *more: str) -> str:
        """Submit the run. Returns the id of the job."""
        printed = self.submit(*more)
        match = re.search(r"submitted job (\d+)", printed)
        assert match is not None, printed
        return match[1]

    def wait_for(self, what: str, condition: Callable[[], bool], job: str, timeout_s: float = 300) -> float:
        """Wait until a condition is true. Returns the seconds it took. Fails at once if the job ends first."""

        def reached() -> bool:
            if condition():
                return True
            state = self.cluster.job(job).get("JobState")
            ended = state not in LIVE_STATES
            assert not ended or condition(), f"job {job} is {state} before {what}\n{self.log()}"
            return ended

        try:
            return wait_until(reached, what, timeout_s)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.cluster.job(job)}\n{self.log()}") from error

    def wait_end(self, job: str, state: str = "COMPLETED", timeout_s: float = 300) -> dict[str, str]:
        """Wait until the job ends, which must be in this state. Returns Slurm's description of it."""
        self.wait_for(
            f"job {job} {state}", lambda: self.cluster.job(job).get("JobState") == state, job, timeout_s
        )
        return self.cluster.job(job)

    def wait_steps(self, n_steps: int, job: str) -> None:
        """Wait until the run has done this number of steps, counted over all attempts."""
        self.wait_for(f"step {n_steps}", lambda: steps_done(self.run_dir) >= n_steps, job)

    def log(self) -> str:
        """The logs of all jobs of the run, for the message of a failed test."""
        paths = sorted(self.run_dir.glob("submit/*/slurm-*.out"))
        return "\n".join(f"--- {path}\n{path.read_text()}" for path in paths)


def steps_done(run_dir: Path) -> int:
    """Number of steps over all attempts; a repeated step counts each time."""
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b'"kind": "step"') if path.exists() else 0


def events(run_dir: Path, *names: str) -> list[dict]:
    """The events of a run in order: those with these names, or all if none are given."""
    found = read_lines(run_dir / "events.jsonl")
    return [event for event in found if not names or event["event"] in names]


def assert_equals_undisturbed(run_dir: Path, straight: Path) -> None:
    """Check that losses, parameters and moments are identical to the bit, and that each sample was read once."""
    ours, theirs = read_metrics(run_dir), read_metrics(straight)
    assert [record["loss"].hex() for record in ours] == [record["loss"].hex() for record in theirs]
    assert_same_state(
        checkpoint.checkpoint_path(run_dir, N_STEPS), checkpoint.checkpoint_path(straight, N_STEPS)
    )
    ledger = read_ledger(run_dir)
    assert sorted(s for entry in ledger for s in entry["samples"]) == list(range(N_STEPS * GLOBAL_BATCH))
    assert [e["tokens_xxh3"] for e in ledger] == [e["tokens_xxh3"] for e in read_ledger(straight)]
    assert [event["step"] for event in events(run_dir, "finished")] == [N_STEPS]


def report(test: str, **seconds: float) -> None:
    """Append the seconds that a test measured to the file named by PRETRAIN_TIMES, if any. No test asserts on them."""
    path = os.environ.get("PRETRAIN_TIMES")
    if path:
        line = {"test": test, "at": time.time(), **{name: round(value, 1) for name, value in seconds.items()}}
        with Path(path).open("a") as file:
            file.write(json.dumps(line) + "\n")
