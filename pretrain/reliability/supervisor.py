"""Runs a training command until it has finished: restarts it after crashes, and leaves no process behind.

    run_dir/attempts/NNN/output.log    what the command printed
    run_dir/attempts/NNN/attempt.json  how this start of the command went
    run_dir/attempts/summary.json      lost time by cause

The command may be any launcher (`deepspeed`, `srun`). How a start went is read from the run's own events, since
launchers return misleading exit codes. Imports no torch.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

from pretrain.config.words.arguments import path_in
from pretrain.errors import ConfigError, ExitCode
from pretrain.files import create_file, hold_lock, refuse_links, touch
from pretrain.printing import say
from pretrain.redaction import redact_command
from pretrain.reliability.events import EVENTS_FILE, Event
from pretrain.reliability.heartbeat import oom_kills
from pretrain.reliability.journal import METRICS_FILE
from pretrain.reliability.json_lines import utc_now
from pretrain.reliability.processes import adopt_orphans, descendants, end_with_parent
from pretrain.reliability.run_lock import LINK_ADVICE, WANDB_STARTS
from pretrain.reliability.starts import (
    OUTPUT_FILE,
    STARTS_FOLDER,
    SUMMARY_FILE,
    Cause,
    Start,
    account,
    find_cause,
    print_summary,
    read_starts,
    write_json,
)
from pretrain.reliability.stop import STOP_FILE

POLL_S = 0.1
MAX_BACKOFF_S = 30.0
FAILED_S = 10.0
"""Seconds that a run may go on after its watchdog has reported a failed rank.

Nothing is left to save then, so this need only be long enough to write the stacks.
"""
LOCK_MARGIN_S = 10.0
"""Seconds that a new supervisor waits for a lock in addition to the grace time.

The guard of a killed supervisor holds the lock. It kills what is left of the run after the grace time, and needs some
time for that.
"""
ENDINGS = {Event.FINISHED, Event.STOPPED, Event.RANK_FAILED}
"""Events after which the processes of a run must end within the grace time."""


def run_dir_of(command: list[str]) -> Path:
    """The run folder that the word `run_dir=` of a training command names. Raises ConfigError if it names none."""
    words = [word for word in command if word.startswith("run_dir=")]
    if not words:
        shown = shlex.join(redact_command(command))
        raise ConfigError(
            f"the command has no word run_dir=DIR; without it the supervisor cannot find the events of the run: {shown}"
        )
    return Path(path_in(words[-1]))


class Supervisor:
    """Starts `command` again and again until its run in `run_dir` has finished, was stopped, or makes no progress.

    It gives up after `max_failures` starts in a row that left no newer complete checkpoint. `grace_s` is the number
    of seconds that a run may take to save and end after it was asked to stop, has recorded its end, or has lost its
    launcher.
    """

    def __init__(self, command: list[str], run_dir: Path, *, max_failures: int, grace_s: float) -> None:
        if shutil.which(command[0]) is None:
            raise ConfigError(f"{command[0]} is no command that can be run; install it or give its path")
        self._command = command
        self._run_dir = run_dir
        self._folder = run_dir / STARTS_FOLDER
        self._max_failures = max_failures
        self._grace_s = grace_s
        self._asked: str | None = None
        self._starts: list[Start] = []
        self._ended_at: float | None = None

    def run(self) -> ExitCode:
        """Supervise until the end and return the exit code. Raises ConfigError if the run folder is in use."""
        try:
            refuse_links(self._run_dir, self._run_dir, LINK_ADVICE, leave_out=WANDB_STARTS)
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run_dir={self._run_dir} cannot be made: {error.strerror}") from error
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        adopt_orphans()
        own = self._wait_for_lock(self._folder / "lock", "another supervisor")
        self._starts = read_starts(self._run_dir)
        try:
            return self._supervise()
        finally:
            own.close()
            # A second signal must not kill a supervisor that is about to return its exit code.
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = self._asked or signal.Signals(number).name

    def _wait_for_lock(self, path: Path, holder: str) -> IO[str]:
        """Take a lock, waiting about as long as the grace time: its holder may be saving. Raises ConfigError."""
        deadline = time.monotonic() + self._grace_s + LOCK_MARGIN_S
        busy = f"run_dir={self._run_dir} is held by {holder}: {path} is locked"
        while True:
            try:
                return hold_lock(path, busy, "stop that one first")
            except ConfigError:
                if self._asked or time.monotonic() > deadline:
                    raise
            time.sleep(POLL_S)

    def _supervise(self) -> ExitCode:
        best = max(complete_checkpoints(self._run_dir), default=0)
        failures = 0
        while True:
            # A rank on another host may still hold the run's lock. Starting now would end with exit code 2, which is
            # meant for a wrong configuration and is never retried.
            self._wait_for_lock(self._run_dir / "lock", "a run that is still going").close()
            start = self._start_once()
            newest = max(start.checkpoints_after, default=0)
            failures = 0 if newest > best else failures + 1
            best = max(best, newest)
            self._write_summary()
            code = self._verdict(start, failures)
            if code is not None:
                self._write_summary(shown=True)
                return code
            if failures:
                self._sleep(min(MAX_BACKOFF_S, 2.0 ** (failures - 1)))
            if self._asked:
                say(
                    f"supervise: {self._asked} came between two attempts; the state of step {newest} is saved"
                )
                self._write_summary(shown=True)
                return ExitCode.STOPPED

    def _verdict(self, start: Start, failures: int) -> ExitCode | None:
        """The exit code of the supervisor if this start is the last one; None if the command is to be started again."""
        log = self._folder / f"{start.number:03d}" / OUTPUT_FILE
        match start.cause:
            case Cause.FINISHED:
                code, text = ExitCode.FINISHED, start.reason
            case Cause.STOPPED:
                code, text = ExitCode.STOPPED, start.reason
            case Cause.CONFIG_ERROR:
                code, text = ExitCode.CONFIG_ERROR, f"not tried again: {start.reason} (log: {log})"
            case Cause.UNSAVED_STOP:
                code, text = ExitCode.CRASHED, f"{start.reason} (log: {log})"
            case _ if failures >= self._max_failures:
                code = ExitCode.CRASHED
                text = f"gave up after {failures} attempts in a row without a newer checkpoint"
                text += f"; the last one: {start.cause}: {start.reason} (log: {log})"
            case _:
                say(f"supervise: attempt {start.number}: {start.cause}: {start.reason}; starting again")
                return None
        say(f"supervise: {text}")
        return code

    def _write_summary(self, *, shown: bool = False) -> None:
        """Write the time that each start and the whole run have lost, and print it if `shown`.

        Damaged metrics or events only cost the summary: they must not end the supervision of a run that works.
        """
        summary = None
        try:
            summary = account(self._starts, self._run_dir)
        except (ConfigError, KeyError, TypeError) as error:
            say(f"warning: the lost time cannot be computed: {error}")
        for start in self._starts[-2:]:  # the time lost to a restart is known only after the next start
            start.write(self._folder / f"{start.number:03d}")
        if summary is not None:
            write_json(self._folder / SUMMARY_FILE, summary)
            if shown:
                print_summary(summary)

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._asked and time.monotonic() < deadline:
            time.sleep(POLL_S)

    # ---- one start ---------------------------------------------------------------------------------------------------

    def _start_once(self) -> Start:
        """Start the command, wait until its last process is gone, and return the complete record."""
        taken = [int(path.name) for path in self._folder.iterdir() if path.name.isdigit()]
        start = Start(
            number=max(taken, default=0) + 1,
            command=redact_command(self._command),
            started=utc_now(),
            checkpoints_before=complete_checkpoints(self._run_dir),
        )
        folder = self._folder / f"{start.number:03d}"
        folder.mkdir()
        start.write(folder)
        began = time.monotonic()
        start.gap_before_s = began - self._ended_at if self._ended_at is not None else 0.0
        kills_before = oom_kills()
        watch = Watch(self._run_dir, folder / OUTPUT_FILE)
        exit_code = self._run_command(folder / OUTPUT_FILE, watch)
        ended = self._ended_at = time.monotonic()
        watch.look()
        start.ended, start.exit_code, start.wall_s = utc_now(), exit_code, ended - began
        start.run_attempts = watch.run_attempts
        start.first_step, start.last_step = watch.first_step, watch.last_step
        trained = watch.first_step_at is not None
        start.startup_s = (watch.first_step_at or ended) - began
        start.detection_s = ended - watch.last_sign_at if trained else start.wall_s
        # Checkpoints in a remote store are not in the run folder; they are known from the events of the run.
        saved = {event["step"] for event in watch.events if event["event"] == Event.CHECKPOINT_SAVED}
        start.checkpoints_after = sorted(saved | set(complete_checkpoints(self._run_dir)))
        start.cause, start.reason = find_cause(
            exit_code,
            watch.events,
            folder / OUTPUT_FILE,
            asked=self._asked,
            oom_kills=oom_kills() - kills_before,
        )
        self._starts.append(start)
        return start

    def _run_command(self, log: Path, watch: Watch) -> int:
        """Run the command and wait until its last process is gone. Returns the exit code of the command.

        The command is a child of a guard, which is a fork of this process. If the supervisor is killed, the guard
        asks the run to stop, gives it the grace time, and kills what is left. Until then the guard holds the
        supervisor's lock, so that no second supervisor starts the run meanwhile.
        """
        supervisor = os.getpid()
        guard = os.fork()
        if guard:
            return self._see_out(guard, watch)
        try:
            os.setsid()  # Ctrl-C reaches the supervisor alone, which then asks the run to stop
            adopt_orphans()
            end_with_parent(supervisor)
            _exit_like(self._see_out(_start(self._command, log), None))
        except BaseException as error:
            say(f"supervise: {error}")
        finally:
            os._exit(1)

    def _see_out(self, child: int, watch: Watch | None) -> int:
        """Wait until a child process and all its descendants are gone. Returns the exit code of the child.

        If the child dies first, or a stop is requested, the rest is asked to stop through the stop file. What has not
        ended by its deadline is killed. The supervisor passes `watch`; its guard, which prints nothing, does not.
        """
        codes: dict[int, int] = {}
        deadline: float | None = None
        failed = False
        stop_file = self._run_dir / STOP_FILE
        while True:
            codes |= _reap()
            gone = child in codes
            if gone and not descendants():
                break
            if watch:
                watch.look()
            if self._asked or gone:
                # Ranks that have lost their launcher only get the time to save. The file is made in every round,
                # because a run that is starting up removes it.
                with suppress(OSError):
                    touch(stop_file)
            if deadline is None and (self._asked or gone or (watch and watch.ending)):
                deadline = time.monotonic() + self._grace_s
            if watch and watch.failed and not failed:
                failed = True
                deadline = min(deadline or math.inf, time.monotonic() + FAILED_S)
            if deadline is not None and time.monotonic() > deadline:
                if watch:
                    within_s = FAILED_S if failed else self._grace_s
                    say(f"supervise: the run has not ended within {within_s:g} s; killing what is left of it")
                codes |= _kill_all()
                break
            time.sleep(POLL_S)
        with suppress(OSError):
            stop_file.unlink()
        return codes[child]


class Watch:
    """Follows what a run writes during one start of its command: its events, its steps and its output."""

    def __init__(self, run_dir: Path, log: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self.first_step: int | None = None
        self.last_step: int | None = None
        self.first_step_at: float | None = None
        """The time on the monotonic clock, in seconds, at which the first completed step was seen."""
        self.last_sign_at = time.monotonic()
        """The time on the monotonic clock, in seconds, at which the newest event or metric was seen."""
        self._events = Tail(run_dir / EVENTS_FILE)
        self._metrics = Tail(run_dir / METRICS_FILE)
        self._log = log
        self._shown_bytes = 0

    @property
    def ending(self) -> bool:
        """Whether the run has recorded that it ends, in whatever way."""
        return any(event["event"] in ENDINGS for event in self.events)

    @property
    def failed(self) -> bool:
        """Whether the watchdog has reported a failed rank and ended the run."""
        return any(event["event"] == Event.RANK_FAILED for event in self.events)

    @property
    def run_attempts(self) -> list[int]:
        """The run's own attempt numbers that this start wrote into events.jsonl."""
        return sorted({event["attempt"] for event in self.events if "attempt" in event})

    def look(self) -> None:
        """Read what the run has written since the last call, and print the new output."""
        events, metrics = self._events.read(), self._metrics.read()
        self.events += [event for event in events if "event" in event]
        if events or metrics:
            self.last_sign_at = time.monotonic()
        for line in metrics:
            if line.get("kind") == "step":
                self.first_step_at = self.first_step_at or self.last_sign_at
                self.first_step = line["step"] if self.first_step is None else self.first_step
                self.last_step = line["step"]
        self._show()

    def _show(self) -> None:
        """Copy new output from the log to stdout.

        The ranks write to the log file directly, not through a pipe, so that they survive the death of the terminal or
        the supervisor.
        """
        with suppress(OSError), self._log.open("rb") as file:
            file.seek(self._shown_bytes)
            text = file.read()
            self._shown_bytes += len(text)
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()


class Tail:
    """Reads the records that are appended to a file of JSON lines, from now on or `from_start` of the file."""

    def __init__(self, path: Path, *, from_start: bool = False) -> None:
        self._path = path
        # Reading begins after the last complete line, because the next writer cuts off an incomplete one.
        self._offset = path.read_bytes().rfind(b"\n") + 1 if path.exists() and not from_start else 0

    def read(self) -> list[dict[str, Any]]:
        """The records of the complete lines since the last call. Lines that are not JSON objects are skipped."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                text = file.read()
        except OSError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        records = []
        for line in whole.splitlines():
            with suppress(ValueError):
                records.append(json.loads(line))
        return [record for record in records if isinstance(record, dict)]


# ---- processes and files ---------------------------------------------------------------------------------------------


def _start(command: list[str], log: Path) -> int:
    """Start the command and return its process id. The command gets SIGTERM if this process is killed."""
    guard = os.getpid()
    # Only the owner may read the log, since any library may have printed a secret into it.
    with create_file(log, 0o600) as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=lambda: end_with_parent(guard),
        )
    process.returncode = 0  # tells Popen not to wait for it: `_reap` does, as for all descendants
    return process.pid


def _exit_like(code: int) -> None:
    """End this process the way another ended: with exit code `code`, or by signal -`code` if it is negative."""
    if code < 0:
        with suppress(OSError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _reap() -> dict[int, int]:
    """Exit codes, by process id, of the children that have ended: the command, and orphans that were adopted."""
    codes = {}
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            codes[ended[0]] = os.waitstatus_to_exitcode(ended[1])
    return codes


def _kill_all() -> dict[int, int]:
    """Kill every descendant. Returns the exit codes, by process id, of the children among them."""
    codes: dict[int, int] = {}
    while left := descendants():
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(POLL_S / 10)
        codes |= _reap()
    return codes | _reap()


def complete_checkpoints(run_dir: Path) -> list[int]:
    """The steps of the checkpoints in the run folder that are marked complete, in ascending order. None is verified."""
    found = (run_dir / "checkpoints").glob("step-*/COMPLETE")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in found)
