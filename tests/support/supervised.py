"""Starts a supervised run for tests and chaos runs, and finds its processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from support import ROOT
from support.launching import free_port

CANARY = "canary-4711"
"""A secret in the environment of every supervised command, which no file or message may contain."""


@dataclass(frozen=True)
class Process:
    """A process that is not a zombie."""

    pid: int
    parent: int
    state: str
    command: str
    started: int
    """Start time in clock ticks since boot, which distinguishes it from a later process with the same pid."""


def processes() -> list[Process]:
    """All processes that are not zombies."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            values = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if values[0] != "Z":
            found.append(Process(int(folder.name), int(values[1]), values[0], command, int(values[19])))
    return found


def below(pid: int) -> list[Process]:
    """The descendants of a process."""
    table = processes()
    found: list[Process] = []
    parents = {pid}
    while parents:
        children = [process for process in table if process.parent in parents]
        parents = {process.pid for process in children}
        found += children
    return found


def role(process: Process, table: list[Process]) -> str:
    """The role of a process in an attempt: deepspeed, launcher, rank, or a process that a rank has started."""
    if "launch/supervise.py" in process.command:
        return "guard"
    if "deepspeed.launcher.launch" in process.command:
        return "launcher"
    parent = next((other.command for other in table if other.pid == process.parent), "")
    if "--local_rank=" in process.command and "deepspeed.launcher.launch" in parent:
        return "rank"
    if "/deepspeed " in process.command:
        return "deepspeed"
    if "pretrain.data.workers" in process.command:
        return "loader worker"
    return "watcher" if "pretrain.reliability.watcher" in process.command else "other"


def kill_tree(pid: int) -> None:
    """Kill a process and all of its descendants."""
    for process in [*below(pid), *(p for p in processes() if p.pid == pid)]:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def deepspeed(n_ranks: int, *arguments: str) -> list[str]:
    """The training command, in the form that the README documents."""
    port = str(free_port())
    return ["deepspeed", "--num_gpus", str(n_ranks), "--master_port", port, "launch/train.py", *arguments]


class Supervised:
    """`launch/supervise.py` with a command. Both are killed when the block ends."""

    def __init__(
        self, run_dir: Path, *command: str, options: tuple[str, ...] = (), env: dict[str, str] | None = None
    ) -> None:
        self.run_dir = run_dir
        self.output = run_dir.parent / f"supervise-{run_dir.name}-{time.monotonic_ns()}.log"
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        environment |= {"OMP_NUM_THREADS": "1", "CANARY_API_KEY": CANARY, **(env or {})}
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "launch/supervise.py", *options, "--", *command],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def __enter__(self) -> Supervised:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            kill_tree(self.process.pid)
        self.process.wait()

    def wait(self, timeout_s: float = 240) -> int:
        """Wait for the supervisor's exit code."""
        return self.process.wait(timeout=timeout_s)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 120, poll_s: float = 0.02) -> None:
        """Wait until a condition is true, which must happen while the supervisor lives."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"it did not happen\n{self.text()}"
            assert self.process.poll() is None, f"the supervisor ended early\n{self.text()}"
            time.sleep(poll_s)

    def victim(self, kind: str, index: int = 0) -> int:
        """The process id of one of the attempt's processes."""
        table = below(self.process.pid)
        found = sorted(process.pid for process in table if role(process, table) == kind)
        assert found, f"no {kind} among {table}"
        return found[index]

    def text(self) -> str:
        """The output of the supervisor, including that of the command."""
        return self.output.read_text(errors="replace")

    def attempts(self) -> list[dict]:
        """The content of every attempt.json, oldest first."""
        paths = sorted((self.run_dir / "attempts").glob("*/attempt.json"))
        return [json.loads(path.read_text()) for path in paths]

    def causes(self) -> list[str]:
        """The cause of each attempt's end, oldest first."""
        return [attempt["cause"] for attempt in self.attempts()]


def processes_of(run_dir: Path) -> list[Process]:
    """All processes that have the run folder on their command line."""
    return [process for process in processes() if f"run_dir={run_dir}" in process.command]
