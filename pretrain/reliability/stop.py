"""Requests to stop a run: a signal, the file `stop` in the run folder, or the end of the time that the run may take."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from pretrain.reliability.heartbeat import LAUNCHER_LOST, LAUNCHER_LOST_SIGNAL
from pretrain.reliability.processes import signal_at_parent_death

STOP_FILE = "stop"
_STARTED = time.monotonic()
_signals: list[str] = []


def listen_for_signals() -> None:
    """Treat SIGTERM, SIGINT, SIGUSR1 and SIGHUP as requests to stop from now on.

    A request that comes during startup is remembered, and the run stops as soon as it has a state to save. SIGHUP is
    sent when a terminal is closed. It stays ignored if `nohup` has had it ignored.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, LAUNCHER_LOST_SIGNAL):
        signal.signal(number, _on_signal)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _on_signal)
    # If the launcher alone is killed, nobody signals its ranks. The kernel then does, so that they save and end.
    signal_at_parent_death(LAUNCHER_LOST_SIGNAL)


def _on_signal(number: int, frame: FrameType | None) -> None:
    name = LAUNCHER_LOST if number == LAUNCHER_LOST_SIGNAL else signal.Signals(number).name
    _signals.append(name)
    if os.environ.get("RANK", "0") == "0":  # at once, because the current step or the startup may take long
        with suppress(OSError):  # the terminal or the reader of the pipe is gone
            os.write(
                sys.stderr.fileno(), f"stop requested ({name}): the run saves its state and ends\n".encode()
            )


class StopRequest:
    """Tells whether this run was asked to save and end: by a signal, by the file `stop`, or by its time limit.

    It only knows what has reached this rank. The trainer agrees with the other ranks before it acts.
    """

    def __init__(self, run_dir: Path, *, watch_file: bool, stop_after_s: float | None = None) -> None:
        self.reason: str | None = None
        self._file = run_dir / STOP_FILE if watch_file else None
        self._stop_after_s = stop_after_s
        if self._file is not None:
            self._file.unlink(missing_ok=True)  # left by a request to an earlier attempt
        listen_for_signals()

    def asked(self) -> bool:
        """Whether a request has reached this rank. `reason` then names the first one."""
        if self.reason is None:
            if _signals:
                self.reason = _signals[0]
                _signals.clear()
            elif self._file is not None and self._file.exists():
                self.reason = f"file {self._file.name}"
            elif self._stop_after_s is not None and time.monotonic() - _STARTED > self._stop_after_s:
                self.reason = f"stop_after_s={self._stop_after_s}"
        return self.reason is not None
