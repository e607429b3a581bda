"""Starts the processes of benchmark runs, lets them take turns, waits for them, and leaves none behind."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.harness.worker import TURNS_PORT, Job
from pretrain.files import create_file
from pretrain.ports import free_port

_TAIL_LINES = 15
_GRACE_S = 10
"""Seconds that the other ranks get to end by themselves after one has failed."""
_POLL_S = 0.1


class RunFailed(Exception):
    """A run gave no result; the text says why, and where its logs are."""


class Ranks:
    """The processes of one run."""

    def __init__(self, command: Sequence[str], folder: Path, job: Job) -> None:
        """Start the processes. `folder` is for their logs."""
        self.folder = folder
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._asking: list[socket.socket] = []
        variables = {
            "WORLD_SIZE": job.ranks,
            "LOCAL_WORLD_SIZE": job.ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
            "OMP_NUM_THREADS": job.threads,
            "HF_HUB_OFFLINE": 1,
        }
        if job.in_turns:
            variables[TURNS_PORT] = self._listener.getsockname()[1]
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank in range(job.ranks):
            own = variables | {"RANK": rank, "LOCAL_RANK": rank}
            env = os.environ | {name: str(value) for name, value in own.items()}
            with create_file(folder / f"rank-{rank}.log") as log:
                self._processes.append(subprocess.Popen(list(command), env=env, stdout=log, stderr=log))

    @property
    def _codes(self) -> list[int | None]:
        return [process.poll() for process in self._processes]

    def wait(self, deadline: float) -> None:
        """Wait until all processes have ended, or until `deadline` (time.monotonic). Raises RunFailed."""
        while None in self._codes and time.monotonic() < deadline:
            if any(self._codes):
                deadline = min(deadline, time.monotonic() + _GRACE_S)
            time.sleep(_POLL_S)
        codes = self._codes
        if any(code != 0 for code in codes):
            rank = max(range(len(codes)), key=lambda r: (codes[r] not in (0, None), codes[r] is None))
            lines = (self.folder / f"rank-{rank}.log").read_text().splitlines()[-_TAIL_LINES:]
            ended = "took too long" if codes[rank] is None else f"ended with exit code {codes[rank]}"
            text = "\n    ".join([f"failed: rank {rank} {ended}; its last lines ({self.folder}):", *lines])
            raise RunFailed(text)

    def kill(self) -> None:
        """Kill the processes that are still running."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for opened in (self._listener, *self._asking):
            opened.close()

    def wait_for_step(self, deadline: float) -> bool:
        """Wait until every process asks for its next step. False where one does not: it has ended or is too late."""
        waiting = [*self._asking, *([self._listener] if not self._asking else [])]
        while waiting and time.monotonic() < deadline:
            for found in select.select(waiting, [], [], _POLL_S)[0]:
                if found is self._listener:
                    waiting.append(found.accept()[0])
                    self._asking.append(waiting[-1])
                    if len(self._asking) < len(self._processes):
                        continue
                elif not _asks(found):
                    return False
                waiting.remove(found)
            if any(code is not None for code in self._codes):
                return False
        return not waiting

    def let_step(self) -> None:
        """Let every process do one step. The next wait notices a process that has died since it asked."""
        for connection in self._asking:
            with suppress(OSError):
                connection.sendall(b"g")


def take_turns(runs: Sequence[Ranks], deadline: float) -> None:
    """Let runs do one step each, in the order A B C, C B A, ..., until they have ended or until `deadline`.

    Where one fails, the others continue; its `wait` raises the error.
    """
    left = [run for run in runs if run.wait_for_step(deadline)]
    while left:
        for run in list(left):
            run.let_step()
            if not run.wait_for_step(deadline):
                left.remove(run)
        left.reverse()


def _asks(connection: socket.socket) -> bool:
    """Whether a process asks for a step. Otherwise it has ended and so closed the connection."""
    try:
        return bool(connection.recv(1))
    except OSError:
        return False
