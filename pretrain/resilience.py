"""What may interrupt training: requests to stop, a dying launcher, a second run in the same folder."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
from pathlib import Path
from types import FrameType
from typing import IO

from pretrain.config import ConfigError

PR_SET_PDEATHSIG = 1  # prctl(2)
STOP_FILE = "stop"


class StopRequest:
    """Whether someone asked this run to save and end: SIGTERM, SIGINT, SIGUSR1, or a file `stop` in the run folder.

    Only this rank's view; the trainer agrees with the other ranks before it acts.
    """

    def __init__(self, run_dir: Path, *, watch_file: bool) -> None:
        self.reason: str | None = None
        self._file = run_dir / STOP_FILE if watch_file else None
        if self._file is not None:
            self._file.unlink(missing_ok=True)  # a request to an earlier attempt
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        # The launcher may be killed alone; its ranks then get SIGTERM from the kernel, save and end.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name

    def asked(self) -> bool:
        """Whether this rank knows of a request by now."""
        if self.reason is None and self._file is not None and self._file.exists():
            self.reason = f"file {self._file.name}"
        return self.reason is not None


_locks: list[IO[str]] = []  # open until the process ends, whatever way that is


def lock_run(run_dir: Path) -> None:
    """Hold the run folder until this process ends. Raises ConfigError while another process holds it."""
    handle = (run_dir / "lock").open("a+")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.seek(0)
        raise ConfigError(
            f"run_dir={run_dir} is in use by another run (process {handle.read().strip() or 'unknown'}); "
            "stop that one or choose another folder"
        ) from error
    handle.seek(0)
    handle.truncate()
    handle.write(f"{os.getpid()} on {os.uname().nodename}\n")
    handle.flush()
    _locks.append(handle)
