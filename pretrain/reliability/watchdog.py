"""A process beside each rank that notices when a rank dies, hangs, is stopped, or its host is gone.

A rank that holds the interpreter lock or is stopped can neither notice nor end itself, so its watcher is another
process (no torch, about 10 MB). The watcher of rank 0 is the hub: all others report to it over TCP every second. When
one rank is in trouble the hub names it; every watcher then has its rank's Python stacks written to
`run_dir/stacks/attempt-NNN/rank-NNNNN.txt` and kills it, so that the launcher ends too. The hub survives its rank.

A watcher also looks at the processes that launched its rank: when one of them dies, the rank is asked to save and end.
"""

from __future__ import annotations

import faulthandler
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from pretrain.config import WatchdogConfig
from pretrain.config.launched import launched_local_size, launched_rank, launched_world_size
from pretrain.reliability import heartbeat

ROOT = Path(__file__).resolve().parents[2]
STACK_SIGNAL = signal.SIGUSR2
_BLOCKED = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}


class Watchdog:
    """This rank's watcher, started at once; `join` makes it one of all ranks'."""

    def __init__(self, run_dir: str | Path, limits: WatchdogConfig) -> None:
        progress = os.memfd_create("progress")
        os.ftruncate(progress, heartbeat.SIZE_BYTES)
        stacks = os.memfd_create("stacks")
        heartbeat.attach(progress)
        # Written in C, without the interpreter lock, from whatever the rank is doing.
        faulthandler.register(STACK_SIGNAL, file=stacks, all_threads=True)
        self._hub = _listen() if launched_rank() == 0 and launched_world_size() > 1 else None
        self._token = secrets.token_hex(16)
        self._started = False
        facts = {
            "rank": launched_rank(),
            "pid": os.getpid(),
            "run_dir": str(Path(run_dir).absolute()),
            "progress": progress,
            "stacks": stacks,
            "hub": self._hub.fileno() if self._hub else None,
            "world_size": launched_world_size(),
            "startup_s": limits.startup_s,
            "step_s": limits.step_s,
            "lost_s": limits.lost_s,
        }
        passed = [fd for name in ("progress", "stacks", "hub") if isinstance(fd := facts[name], int)]
        # Requests to stop reach all processes of a job, and its watcher must outlive the rank: they stay blocked.
        allowed = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pretrain.reliability.watcher"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                pass_fds=passed,
                start_new_session=True,
                text=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, allowed)
        self._tell(facts)

    @property
    def address(self) -> list[Any] | None:
        """Host, port and password of the hub; on rank 0 of several only."""
        return [*self._hub.getsockname()[:2], self._token] if self._hub else None

    def join(self, hub: list[Any] | None) -> None:
        """Report to rank 0's watcher at `hub`, its `address`."""
        self._tell({"join": hub})
        if self._hub is not None:
            self._hub.close()

    def attempt(self, number: int) -> None:
        """The number of this start of the run, for the folder of the stacks."""
        self._tell({"attempt": number})

    def started(self) -> None:
        """The first step is done: from now on the short limit holds."""
        if not self._started:
            self._started = True
            self._tell({"started": True})

    def close(self) -> None:
        """This rank ends as it should."""
        self._tell({"bye": True})

    def _tell(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError:  # it was killed: the hub has noticed
            pass


def _listen() -> socket.socket:
    """On the address at which the ranks meet, not on all of this host's."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one_host = launched_local_size() == launched_world_size()
    listener.bind(("127.0.0.1" if one_host else socket.gethostbyname(os.environ["MASTER_ADDR"]), 0))
    listener.listen(4096)
    return listener
