"""Start real ranks: one process each, with the environment that a launcher would give them."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pretrain.ports import PORTS
from support import ROOT


def free_port() -> int:
    """A port that no other test on this machine gets. A counter in a file hands out ports in turn."""
    with open(Path(tempfile.gettempdir()) / "pretrain-tests-port", "a+") as counter:
        fcntl.flock(counter, fcntl.LOCK_EX)
        counter.seek(0)
        port = int(counter.read() or PORTS.start)
        while True:
            port = port + 1 if port + 1 in PORTS else PORTS.start
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) != 0:  # no process listens on it
                    break
        counter.truncate(0)
        counter.write(str(port))
    return port


def children_of(process: int) -> list[int]:
    """The processes that a process has started, from any of its threads."""
    lists = Path(f"/proc/{process}/task").glob("*/children")
    return [int(pid) for children in lists for pid in children.read_text().split()]


def loader_workers(process: int) -> list[int]:
    """The processes that read training data for a trainer."""
    return [
        pid
        for pid in children_of(process)
        if b"pretrain.data.workers" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


class Ranks:
    """The processes of one world, which are killed when the block ends for any reason."""

    def __init__(
        self,
        n_ranks: int,
        script: str,
        *args: str,
        log_dir: Path,
        env: dict[str, str] | None = None,
        env_of: dict[int, dict[str, str]] | None = None,
    ) -> None:
        """`env` has environment variables for all ranks, and `env_of` those for single ranks."""
        port = str(free_port())
        log_dir.mkdir(parents=True, exist_ok=True)
        self.logs = [log_dir / f"rank-{rank}.log" for rank in range(n_ranks)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            variables = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(n_ranks),
                "LOCAL_WORLD_SIZE": str(n_ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
                **(env or {}),
                **(env_of or {}).get(rank, {}),
            }
            with log.open("w") as output:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, script, *args], cwd=ROOT, env=variables, stdout=output, stderr=output
                    )
                )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def wait(self, timeout_s: float = 240) -> list[int]:
        """Wait for the exit codes, by rank. Like a launcher, end the other ranks soon after the first failure."""
        deadline = time.monotonic() + timeout_s
        while any(process.poll() is None for process in self.processes):
            failed = any(process.poll() not in (None, 0) for process in self.processes)
            if failed:
                deadline = min(deadline, time.monotonic() + 20)
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        return [process.wait() for process in self.processes]

    def output(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in self.logs)


def run_ranks(
    n_ranks: int, script: str, *args: str, log_dir: Path, timeout_s: float = 240, expect: int = 0
) -> None:
    """Run ranks to the end. Every rank must exit with the expected code."""
    with Ranks(n_ranks, script, *args, log_dir=log_dir) as ranks:
        codes = ranks.wait(timeout_s)
    assert codes == [expect] * n_ranks, f"exit codes {codes}\n{ranks.output()}"
