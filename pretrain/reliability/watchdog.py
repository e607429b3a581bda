"""Starts a process beside each rank, its watcher, which notices if a rank dies, hangs, is stopped, or loses its host.

A rank that holds the interpreter lock or is stopped can neither notice that nor end itself, so its watcher is another
process (no torch, about 10 MB). The watcher of rank 0 is the hub: all others report to it over TCP every second,
because only by comparing all ranks can one tell which of them blocks the others. When a rank has failed, the hub names
it. Every watcher then writes its rank's Python stacks to `run_dir/stacks/attempt-NNN/rank-NNNNN.txt` and kills the
rank, so that the launcher ends too. The hub outlives its rank.

A watcher also watches the processes that launched its rank. If one of them dies, it asks the rank to save and end.
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
from pretrain.reliability.events import EVENTS_FILE

ROOT = Path(__file__).resolve().parents[2]
STACK_SIGNAL = signal.SIGUSR2
_BLOCKED = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}


class Watchdog:
    """The rank's end of the connection to its watcher, which it starts at once.

    Until `join`, the watcher knows of its own rank only, so that it can watch startup before the ranks have met.
    """

    def __init__(self, run_dir: str | Path, limits: WatchdogConfig) -> None:
        progress = os.memfd_create("progress")
        os.ftruncate(progress, heartbeat.SIZE_BYTES)
        stacks = os.memfd_create("stacks")
        heartbeat.attach(progress)
        # faulthandler writes the stacks in C and without the interpreter lock, so it works whatever the rank is doing.
        faulthandler.register(STACK_SIGNAL, file=stacks, all_threads=True)
        self._hub = _listen() if launched_rank() == 0 and launched_world_size() > 1 else None
        self._token = secrets.token_hex(16)
        self._started = False
        events = Path(run_dir) / EVENTS_FILE
        facts = {
            "rank": launched_rank(),
            "pid": os.getpid(),
            "run_dir": str(Path(run_dir).absolute()),
            "events_bytes": events.stat().st_size if events.exists() else 0,
            "progress": progress,
            "stacks": stacks,
            "hub": self._hub.fileno() if self._hub else None,
            "world_size": launched_world_size(),
            "startup_s": limits.startup_s,
            "step_s": limits.step_s,
            "lost_s": limits.lost_s,
        }
        passed = [fd for name in ("progress", "stacks", "hub") if isinstance(fd := facts[name], int)]
        # A request to stop may be sent to all processes of a job. The watcher must outlive its rank, so it inherits
        # these signals blocked.
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
        """The host, port and password of the hub. Only rank 0 of several ranks knows it; None elsewhere."""
        return [*self._hub.getsockname()[:2], self._token] if self._hub else None

    def join(self, hub: list[Any] | None) -> None:
        """Have the watcher report to the hub at rank 0's `address`, or to nobody (None) if there is only one rank."""
        self._tell({"join": hub})
        if self._hub is not None:
            self._hub.close()

    def attempt(self, number: int) -> None:
        """Tell the watcher the run's attempt number, which the stack folder and the event `rank_failed` carry."""
        self._tell({"attempt": number})

    def started(self) -> None:
        """Tell the watcher that the first step is done. From now on `step_s` is the limit, not `startup_s`."""
        if not self._started:
            self._started = True
            self._tell({"started": True})

    def close(self) -> None:
        """Tell the watcher that this rank is about to end normally, so that its end is not taken for a failure."""
        self._tell({"bye": True})

    def _tell(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError:  # the watcher was killed, which the hub notices
            pass


def _listen() -> socket.socket:
    """Listen on the address at which the ranks meet only, not on every address of this host."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one_host = launched_local_size() == launched_world_size()
    listener.bind(("127.0.0.1" if one_host else socket.gethostbyname(os.environ["MASTER_ADDR"]), 0))
    listener.listen(4096)
    return listener
