"""Runs the commands of a longer job one after another, and ends them when a stop is requested.

This module uses only the standard library, because the job may have to create its environment first.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO

from pretrain.files import create_file, open_lock, touch
from pretrain.reliability.processes import end_with_parent

POLL_S = 0.1
GRACE_S = 20.0
"""Seconds that a command other than a training run gets to end after SIGTERM."""
CHATTER = re.compile(r'\[[0-9-]+ [0-9:,]+\] \[(INFO|WARNING|ERROR)\] \[[a-z_]+\.py|\[W[0-9]{3,}|\{"run_dir"')
"""Matches lines that are meant for programs. They are written to the log but not shown on the screen."""


class Failed(Exception):
    """The job cannot continue; the text says why."""


class Stopped(Exception):
    """A stop was requested; the text says how."""


def say(text: str) -> None:
    """Print a line, whether or not anyone still reads it."""
    with suppress(OSError):
        print(text, flush=True)


class CommandRunner:
    """Runs commands in the folder `cwd`. Each gets a log in the folder `logs` and a line in the file `table`.

    SIGINT, SIGTERM, SIGHUP and the file `stop_file` request a stop. A request ends the running command and keeps the
    next one from starting. A stop file that exists when this object is created is deleted.
    """

    def __init__(self, *, cwd: Path, logs: Path, table: Path, stop_file: Path) -> None:
        self._cwd, self._logs, self._table, self._stop_file = cwd, logs, table, stop_file
        self._asked: str | None = None
        logs.mkdir(exist_ok=True)
        create_file(table).close()
        stop_file.unlink(missing_ok=True)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup, SIGHUP must stay ignored
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = self._asked or signal.Signals(number).name

    def reuse(self, name: str, what: str) -> None:
        """Report that a command need not run because its result `what` exists."""
        say(f"already there: {what}")
        self._note(name, "")

    def run(self, name: str, command: list[str], *, codes: Iterable[int] = (0,), trains: bool = False) -> int:
        """Run a command to its end and return its exit code. Raises Failed for a code not in `codes`, and Stopped.

        A training run (`trains`) is asked to stop by its stop file and gets all the time that it needs to save.
        """
        self._heed()
        log = self._logs / f"{name}.log"
        started = time.monotonic()
        with create_file(log) as output:
            output.write(f"$ {shlex.join(command)}\n\n".encode())
            output.flush()
            # The command runs in its own session, so that Ctrl-C reaches only this process. It writes to the log file
            # directly, so that it can still save its state when this process or the terminal is gone.
            child = subprocess.Popen(
                command,
                cwd=self._cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=partial(end_with_parent, os.getpid()),
            )
        code = self._see_out(child, log, trains)
        self._heed()
        if code not in codes:
            raise Failed(
                f"stage {name} ended with exit code {code}: {_last_error(log)}\n"
                f"The log is {log}; the same command continues from here."
            )
        self._note(name, f"{time.monotonic() - started:.0f}")
        return code

    def _see_out(self, child: subprocess.Popen[bytes], log: Path, trains: bool) -> int:
        """Show the output of the command until it ends, stopping it on request. Returns its exit code."""
        kill_at: float | None = None
        with log.open(encoding="utf-8", errors="replace") as written:
            for _ in range(2):  # skip the line with the command and the empty line after it
                written.readline()
            while child.poll() is None:
                _show(written)
                if self._asked_by():
                    if kill_at is None:
                        kill_at = time.monotonic() + GRACE_S
                        say(
                            f"quickstart: {self._asked}: {'saving the state of the run' if trains else 'stopping'}"
                        )
                        if not trains:
                            _signal_group(child, signal.SIGTERM)
                    if trains:  # repeatedly, because a run that is starting deletes an old stop file
                        with suppress(OSError):
                            touch(self._stop_file)
                    elif time.monotonic() > kill_at:
                        _signal_group(child, signal.SIGKILL)
                time.sleep(POLL_S)
            _show(written)
        return child.returncode

    def _asked_by(self) -> str | None:
        if self._asked is None and self._stop_file.exists():
            self._asked = f"file {self._stop_file}"
        return self._asked

    def _heed(self) -> None:
        """Raise Stopped if a stop was requested."""
        if asked := self._asked_by():
            self._stop_file.unlink(missing_ok=True)
            raise Stopped(asked)

    def _note(self, name: str, seconds: str) -> None:
        with open_lock(self._table) as table:
            table.write(f"{name}\t{seconds}\n")


def _signal_group(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def _show(written: IO[str]) -> None:
    """Print the new complete lines, except those that are meant for programs."""
    while True:
        at = written.tell()
        line = written.readline()
        if not line.endswith("\n"):
            written.seek(at)
            return
        if not CHATTER.match(line):
            say(line.rstrip("\n"))


def _last_error(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if re.match(r"(error|setup_env\.sh|\S*Error):", line, re.I)]
    return errors[-1] if errors else "no line of the log names an error"
