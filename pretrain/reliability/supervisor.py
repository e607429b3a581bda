"""Runs a training command until it has finished: restarts it after crashes, and leaves no process behind.

    run_dir/attempts/NNN/output.log    what the command wrote
    run_dir/attempts/NNN/attempt.json  how it went
    run_dir/attempts/summary.json      lost time by cause

The command may be any launcher (`deepspeed`, `srun`): how an attempt went is read from the run's own events, since
launchers return odd codes. Imports no torch.
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

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from pretrain.errors import ConfigError, ExitCode
from pretrain.files import create_file, hold_lock, refuse_links, touch
from pretrain.printing import say
from pretrain.redaction import redact_command
from pretrain.reliability.attempts import (
    ATTEMPTS_FOLDER,
    OUTPUT_FILE,
    SUMMARY_FILE,
    Attempt,
    Cause,
    account,
    find_cause,
    print_summary,
    read_attempts,
    write_json,
)
from pretrain.reliability.events import EVENTS_FILE, Event
from pretrain.reliability.heartbeat import oom_kills
from pretrain.reliability.journal import METRICS_FILE
from pretrain.reliability.json_lines import utc_now
from pretrain.reliability.processes import adopt_orphans, descendants, end_with_parent
from pretrain.reliability.run_lock import LINK_ADVICE, WANDB_STARTS
from pretrain.reliability.stop import STOP_FILE

POLL_S = 0.1
MAX_BACKOFF_S = 30.0
FAILED_S = 10.0
"""After its watchdog has said that a rank failed, a run has nothing left to save: stacks take a few seconds."""
LOCK_MARGIN_S = 10.0
"""Beyond the grace time, after which the guard of a killed supervisor kills what is left."""
ENDINGS = {Event.FINISHED, Event.STOPPED, Event.RANK_FAILED}
"""Events after which a run's processes must end soon."""


def run_dir_of(command: list[str]) -> Path:
    """The run folder that a training command names with its word `run_dir=`. Raises ConfigError."""
    words = [word for word in command if word.startswith("run_dir=")]
    if not words:
        shown = shlex.join(redact_command(command))
        raise ConfigError(f"the command has no word run_dir=DIR, which says where its events are: {shown}")
    try:
        value = OverridesParser.create().parse_override(words[-1]).value()
    except HydraException as error:
        raise ConfigError(f"{words[-1]} is no value that Hydra can read; quote it") from error
    if not isinstance(value, str | int) or not str(value) or "${" in str(value):
        raise ConfigError(f"{words[-1]}: run_dir must be the path of a folder")
    return Path(str(value))


class Supervisor:
    """Starts `command` again until its run in `run_dir` has finished, was stopped, or gets no further.

    `max_failures`: attempts in a row without a newer complete checkpoint. `grace_s`: how long a run may take to save
    and end, once it was asked to or has lost its launcher.
    """

    def __init__(self, command: list[str], run_dir: Path, *, max_failures: int, grace_s: float) -> None:
        if shutil.which(command[0]) is None:
            raise ConfigError(f"{command[0]} is no command that can be run; install it or give its path")
        self._command = command
        self._run_dir = run_dir
        self._folder = run_dir / ATTEMPTS_FOLDER
        self._max_failures = max_failures
        self._grace_s = grace_s
        self._asked: str | None = None
        self._attempts: list[Attempt] = []
        self._ended_at: float | None = None

    def run(self) -> ExitCode:
        """Supervise to the end. Raises ConfigError where another run or supervisor holds the folder."""
        try:
            refuse_links(self._run_dir, self._run_dir, LINK_ADVICE, leave_out=WANDB_STARTS)
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run_dir={self._run_dir} cannot be made: {error.strerror}") from error
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        adopt_orphans()
        own = self._wait_for_lock(self._folder / "lock", "another supervisor")
        self._attempts = read_attempts(self._run_dir)
        try:
            return self._supervise()
        finally:
            own.close()
            # A request that is repeated must not kill a supervisor that is about to return its exit code.
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = self._asked or signal.Signals(number).name

    def _wait_for_lock(self, path: Path, holder: str) -> IO[str]:
        """Take a lock, waiting for at most the grace time: what holds it may be saving. Raises ConfigError."""
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
            # A rank may linger on another host. It would make the next attempt look like a mistake of configuration.
            self._wait_for_lock(self._run_dir / "lock", "a run that still goes on").close()
            attempt = self._attempt()
            newest = max(attempt.checkpoints_after, default=0)
            failures = 0 if newest > best else failures + 1
            best = max(best, newest)
            self._write_summary()
            code = self._verdict(attempt, failures)
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

    def _verdict(self, attempt: Attempt, failures: int) -> ExitCode | None:
        """How supervision ends after this attempt; None: it goes on."""
        log = self._folder / f"{attempt.number:03d}" / OUTPUT_FILE
        match attempt.cause:
            case Cause.FINISHED:
                code, text = ExitCode.FINISHED, attempt.reason
            case Cause.STOPPED:
                code, text = ExitCode.STOPPED, attempt.reason
            case Cause.CONFIG_ERROR:
                code, text = ExitCode.CONFIG_ERROR, f"not tried again: {attempt.reason} (log: {log})"
            case Cause.UNSAVED_STOP:
                code, text = ExitCode.CRASHED, f"{attempt.reason} (log: {log})"
            case _ if failures >= self._max_failures:
                code = ExitCode.CRASHED
                text = f"gave up after {failures} attempts in a row without a newer checkpoint"
                text += f"; the last one: {attempt.cause}: {attempt.reason} (log: {log})"
            case _:
                say(f"supervise: attempt {attempt.number}: {attempt.cause}: {attempt.reason}; starting again")
                return None
        say(f"supervise: {text}")
        return code

    def _write_summary(self, *, shown: bool = False) -> None:
        """Write what each attempt and all together have lost, and show it. A damaged record ends no supervision."""
        summary = None
        try:
            summary = account(self._attempts, self._run_dir)
        except (ConfigError, KeyError, TypeError) as error:
            say(f"warning: what the attempts have lost cannot be told: {error}")
        for attempt in self._attempts[-2:]:  # what one lost is known when the next has begun to train
            attempt.write(self._folder / f"{attempt.number:03d}")
        if summary is not None:
            write_json(self._folder / SUMMARY_FILE, summary)
            if shown:
                print_summary(summary)

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._asked and time.monotonic() < deadline:
            time.sleep(POLL_S)

    # ---- one attempt -------------------------------------------------------------------------------------------------

    def _attempt(self) -> Attempt:
        taken = [int(path.name) for path in self._folder.iterdir() if path.name.isdigit()]
        attempt = Attempt(
            number=max(taken, default=0) + 1,
            command=redact_command(self._command),
            started=utc_now(),
            checkpoints_before=complete_checkpoints(self._run_dir),
        )
        folder = self._folder / f"{attempt.number:03d}"
        folder.mkdir()
        attempt.write(folder)
        began = time.monotonic()
        attempt.gap_before_s = began - self._ended_at if self._ended_at is not None else 0.0
        kills_before = oom_kills()
        watch = Watch(self._run_dir, folder / OUTPUT_FILE)
        exit_code = self._run_command(folder / OUTPUT_FILE, watch)
        ended = self._ended_at = time.monotonic()
        watch.look()
        attempt.ended, attempt.exit_code, attempt.wall_s = utc_now(), exit_code, ended - began
        attempt.run_attempts = watch.run_attempts
        attempt.first_step, attempt.last_step = watch.first_step, watch.last_step
        trained = watch.first_step_at is not None
        attempt.startup_s = (watch.first_step_at or ended) - began
        attempt.detection_s = ended - watch.last_sign_at if trained else attempt.wall_s
        # Those in a remote store are known from what the run said.
        saved = {event["step"] for event in watch.events if event["event"] == Event.CHECKPOINT_SAVED}
        attempt.checkpoints_after = sorted(saved | set(complete_checkpoints(self._run_dir)))
        attempt.cause, attempt.reason = find_cause(
            exit_code,
            watch.events,
            folder / OUTPUT_FILE,
            asked=self._asked,
            oom_kills=oom_kills() - kills_before,
        )
        self._attempts.append(attempt)
        return attempt

    def _run_command(self, log: Path, watch: Watch) -> int:
        """Run the command and see its last process gone. Returns its exit code.

        Between this process and the command stands a guard, a fork of this process: should the supervisor be killed,
        its guard asks the run to stop and ends it. It holds the supervisor's lock until then.
        """
        supervisor = os.getpid()
        guard = os.fork()
        if guard:
            return self._see_out(guard, watch)
        try:
            os.setsid()  # Ctrl-C is for the supervisor, who asks the run
            adopt_orphans()
            end_with_parent(supervisor)
            _exit_like(self._see_out(_start(self._command, log), None))
        except BaseException as error:
            say(f"supervise: {error}")
        finally:
            os._exit(1)

    def _see_out(self, child: int, watch: Watch | None) -> int:
        """Wait for a child process, and for all that it leaves behind. Returns the child's exit code."""
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
                # Ranks without a launcher get time to save, no more. Again and again: a run that starts removes it.
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
                    say(f"supervise: not ended within {within_s:g} s; killing what is left")
                codes |= _kill_all()
                break
            time.sleep(POLL_S)
        with suppress(OSError):
            stop_file.unlink()
        return codes[child]


class Watch:
    """What a run writes while one attempt goes on: its events, its steps, its output."""

    def __init__(self, run_dir: Path, log: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self.first_step: int | None = None
        self.last_step: int | None = None
        self.first_step_at: float | None = None
        """Of the monotonic clock, as `last_sign_at`."""
        self.last_sign_at = time.monotonic()
        self._events = Tail(run_dir / EVENTS_FILE)
        self._metrics = Tail(run_dir / METRICS_FILE)
        self._log = log
        self._shown_bytes = 0

    @property
    def ending(self) -> bool:
        """Whether the run has recorded its end."""
        return any(event["event"] in ENDINGS for event in self.events)

    @property
    def failed(self) -> bool:
        """Whether the run's watchdog has ended it."""
        return any(event["event"] == Event.RANK_FAILED for event in self.events)

    @property
    def run_attempts(self) -> list[int]:
        """The numbers that the run gave this attempt."""
        return sorted({event["attempt"] for event in self.events if "attempt" in event})

    def look(self) -> None:
        """Read what is new."""
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
        """Pass the output on. Ranks write to the file itself, so that they outlive a dead terminal or supervisor."""
        with suppress(OSError), self._log.open("rb") as file:
            file.seek(self._shown_bytes)
            text = file.read()
            self._shown_bytes += len(text)
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()


class Tail:
    """The records that are added to a file of JSON lines, from now on or from its beginning."""

    def __init__(self, path: Path, *, from_start: bool = False) -> None:
        self._path = path
        # From the last whole line: a torn one is cut off by the next writer.
        self._offset = path.read_bytes().rfind(b"\n") + 1 if path.exists() and not from_start else 0

    def read(self) -> list[dict[str, Any]]:
        """The whole lines since the last call; one that is no JSON is left out."""
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
    """Start the command; should this process be killed, it gets SIGTERM."""
    guard = os.getpid()
    with create_file(
        log, 0o600
    ) as output:  # what all libraries print: nobody knows whether a secret is in it
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=lambda: end_with_parent(guard),
        )
    process.returncode = 0  # it is waited for in `_reap`, with those that it leaves behind
    return process.pid


def _exit_like(code: int) -> None:
    """End this process as the one ended whose exit code, or negative signal, it is."""
    if code < 0:
        with suppress(OSError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _reap() -> dict[int, int]:
    """Exit codes of the children that have ended: the command, and processes whose parents died."""
    codes = {}
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            codes[ended[0]] = os.waitstatus_to_exitcode(ended[1])
    return codes


def _kill_all() -> dict[int, int]:
    """End every descendant; exit codes of the children among them."""
    codes: dict[int, int] = {}
    while left := descendants():
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(POLL_S / 10)
        codes |= _reap()
    return codes | _reap()


def complete_checkpoints(run_dir: Path) -> list[int]:
    """Steps of the checkpoints that are complete, oldest first; not verified."""
    found = (run_dir / "checkpoints").glob("step-*/COMPLETE")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in found)
