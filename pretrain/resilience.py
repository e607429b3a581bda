"""What may interrupt training: requests to stop, a loss that goes wrong, a second run in the same folder."""

from __future__ import annotations

import ctypes
import fcntl
import math
import os
import signal
import statistics
import time
from collections import deque
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import IO, Any

from pretrain.config import ConfigError, LossGuardConfig, SpikeAction
from pretrain.files import open_lock, refuse_links
from pretrain.heartbeat import LAUNCHER_LOST, LAUNCHER_LOST_SIGNAL

PR_SET_PDEATHSIG = 1  # prctl(2)
STOP_FILE = "stop"
LINK_ADVICE = "remove it; checkpoint.target=DIR keeps checkpoints elsewhere"
"""Where a run folder holds a link: someone may have made it to have this run overwrite files of yours."""
WANDB_STARTS = "wandb/*run-*"
"""Folders of a run folder that W&B makes, one per start. It links to its logs in the user's cache there, and writes
nothing into them at a later start."""
_STARTED = time.monotonic()
_signals: list[str] = []


def listen_for_signals() -> None:
    """From now on SIGTERM, SIGINT, SIGUSR1 and SIGHUP are requests to stop, heeded once training could save.

    SIGHUP, which comes when a terminal is closed, stays ignored where `nohup` has ignored it.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, LAUNCHER_LOST_SIGNAL):
        signal.signal(number, _on_signal)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _on_signal)
    # The launcher may be killed alone; its ranks then save and end.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, LAUNCHER_LOST_SIGNAL, 0, 0, 0)


def _on_signal(number: int, frame: FrameType | None) -> None:
    _signals.append(LAUNCHER_LOST if number == LAUNCHER_LOST_SIGNAL else signal.Signals(number).name)


class StopRequest:
    """Whether someone asked this run to save and end: a signal, a file `stop` in the run folder, or the clock.

    Only this rank's view; the trainer agrees with the other ranks before it acts.
    """

    def __init__(self, run_dir: Path, *, watch_file: bool, stop_after_s: float | None = None) -> None:
        self.reason: str | None = None
        self._file = run_dir / STOP_FILE if watch_file else None
        self._stop_after_s = stop_after_s
        if self._file is not None:
            self._file.unlink(missing_ok=True)  # a request to an earlier attempt
        listen_for_signals()

    def asked(self) -> bool:
        """Whether this rank knows of a request by now."""
        if self.reason is None:
            if _signals:
                self.reason = _signals[0]
                _signals.clear()
            elif self._file is not None and self._file.exists():
                self.reason = f"file {self._file.name}"
            elif self._stop_after_s is not None and time.monotonic() - _STARTED > self._stop_after_s:
                self.reason = f"stop_after_s={self._stop_after_s}"
        return self.reason is not None


class Verdict(Enum):
    """What a step was."""

    GOOD = "good"
    SKIPPED = "skipped"
    ROLL_BACK = "roll back"


class LossGuard:
    """Judges each step by its loss; fed the same numbers on every rank, it decides alike on every rank.

    `state` is what `state()` gave when the checkpoint was written, so that a resumed run decides as it would have.
    """

    def __init__(self, config: LossGuardConfig, state: Mapping[str, Any] | None = None) -> None:
        self._config = config
        self._losses: deque[float] = deque(state["losses"] if state else [], config.window_steps)
        self._skips: int = state["skips"] if state else 0
        """Updates left out in a row."""

    def state(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"losses": list(self._losses), "skips": self._skips}

    def limit(self) -> float:
        """The next step's loss is a spike above this: median + spike_sigmas x 1.4826 x median absolute deviation."""
        sigmas = self._config.spike_sigmas
        if sigmas is None or len(self._losses) < self._config.window_steps:
            return math.inf
        median = statistics.median(self._losses)
        deviation = statistics.median(abs(loss - median) for loss in self._losses)
        return (
            median + sigmas * 1.4826 * deviation
        )  # 1.4826: equals the standard deviation of a normal sample

    def judge(self, loss: float, limit: float, *, applied: bool) -> Verdict:
        """What to do after a step of this loss, whose `limit()` was `limit` and whose update was `applied` or not."""
        if applied:
            self._losses.append(loss)
            self._skips = 0
            return Verdict.GOOD
        self._skips += 1
        spike = loss > limit and self._config.on_spike is SpikeAction.rollback
        if spike or self._skips >= self._config.max_skips_in_a_row:
            return Verdict.ROLL_BACK
        return Verdict.SKIPPED

    @property
    def skips_in_a_row(self) -> int:
        """Updates left out in a row, up to the last step."""
        return self._skips


_locks: list[IO[str]] = []  # open until the process ends, whatever way that is


def lock_run(run_dir: Path, target: Path | None = None) -> None:
    """Hold the run folder until this process ends. `target`: another folder that checkpoints are written into.

    Raises ConfigError while another process holds it, and for a link that would have us write elsewhere.
    """
    refuse_links(run_dir, run_dir, LINK_ADVICE, leave_out=WANDB_STARTS)
    if target is not None:
        refuse_links(target / "checkpoints", target, LINK_ADVICE)
    handle = open_lock(run_dir / "lock")
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
