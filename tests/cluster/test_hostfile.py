"""Two hosts without Slurm: `deepspeed --hostfile` over ssh, as docs/multinode.md has it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from support import ROOT
from support.cluster.hosts import Cluster, wait_until
from support.cluster.runs import (
    ENVIRONMENT,
    N_STEPS,
    SAVE_EVERY_STEPS,
    arguments,
    assert_equals_undisturbed,
    events,
    report,
    steps_done,
)
from support.tiny import TinyCorpus

PDSH = ["--launcher", "pdsh", "--master_port", "29511"]


class HostfileRun:
    """A run on all nodes, started on the first one, in a folder with `hostfile` and `.deepspeed_env`."""

    def __init__(self, cluster: Cluster, corpus: TinyCorpus, folder: Path) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        self._first = cluster.nodes[0]
        self._arguments = arguments(corpus, self.run_dir)
        folder.mkdir()
        (folder / "hostfile").write_text("".join(f"{node.name} slots=1\n" for node in cluster.nodes))
        settings = [
            f"PATH={ENVIRONMENT['PATH']}",
            "GLOO_SOCKET_IFNAME=eth0",
            "DS_ACCELERATOR=cpu",
            "OMP_NUM_THREADS=1",
        ]
        settings.append(f"TORCH_EXTENSIONS_DIR={cluster.folder}/local/torch_extensions")
        (folder / ".deepspeed_env").write_text("\n".join(settings) + "\n")

    def start(self, *before: str) -> subprocess.Popen[bytes]:
        train = str(ROOT / "launch" / "train.py")
        words = [*before, "deepspeed", "--hostfile", "hostfile", *PDSH, train, *self._arguments]
        environment = ENVIRONMENT | {"DS_ACCELERATOR": "cpu"}
        return self._first.start(*words, log=self.folder / "log", cwd=self.folder, env=environment)

    def wait_steps(self, n_steps: int) -> None:
        try:
            wait_until(lambda: steps_done(self.run_dir) >= n_steps, f"step {n_steps}", 120)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.log()}") from error

    def log(self) -> str:
        return (self.folder / "log").read_text()[-8000:]


def test_hostfile_run_equals_one_machine(
    cluster: Cluster, corpus: TinyCorpus, straight: Path, tmp_path: Path
) -> None:
    """Stopped half way by the stop file, then resumed by the same command; the launcher's codes are ours."""
    run = HostfileRun(cluster, corpus, tmp_path / "work")
    process = run.start()
    run.wait_steps(3)
    (run.run_dir / "stop").touch()
    assert process.wait(60) == 75, run.log()
    [stopped] = events(run.run_dir, "stopped")
    assert stopped["step"] < N_STEPS
    assert run.start().wait(120) == 0, run.log()
    assert [event["step"] for event in events(run.run_dir, "resumed")] == [stopped["step"]]
    assert_equals_undisturbed(run.run_dir, straight)


@pytest.mark.long  # on one host in test_supervise.py
def test_supervised_hostfile_run_survives_a_killed_rank(
    cluster: Cluster, corpus: TinyCorpus, straight: Path, tmp_path: Path
) -> None:
    """`launch/supervise.py -- deepspeed --hostfile ...` goes on by itself after SIGKILL of a rank on the other host."""
    run = HostfileRun(cluster, corpus, tmp_path / "work")
    process = run.start(sys.executable, str(ROOT / "launch" / "supervise.py"), "--")
    run.wait_steps(SAVE_EVERY_STEPS + 1)
    killed = time.monotonic()
    rank = f"^{sys.executable} -u {ROOT}/launch/train.py"
    cluster.nodes[1].run("bash", "-c", f"kill -9 $(pgrep -o -f '{rank}')")
    seconds = wait_until(lambda: len(events(run.run_dir, "resumed")) == 1, "resumed", 120)
    assert process.wait(120) == 0, run.log()
    assert_equals_undisturbed(run.run_dir, straight)
    report("hostfile, rank 1 killed", to_resume_s=seconds, whole_s=time.monotonic() - killed)
