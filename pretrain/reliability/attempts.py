"""What one supervised start of a run came to: its cause, its progress, the time it lost. Imports no torch.

Durations come from monotonic clocks, the supervisor's and the run's own; times of day are for people only.
"""

from __future__ import annotations

import json
import re
import signal
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from pretrain.errors import ExitCode
from pretrain.files import read_capped, write_atomically
from pretrain.reliability.events import Event, RankFailure
from pretrain.reliability.heartbeat import LAUNCHER_LOST
from pretrain.reliability.journal import METRICS_FILE, read_metrics
from pretrain.reliability.json_lines import read_lines
from pretrain.stored import parse

ATTEMPTS_FOLDER = "attempts"
OUTPUT_FILE = "output.log"
ATTEMPT_FILE = "attempt.json"
SUMMARY_FILE = "summary.json"
_MAX_ATTEMPT_BYTES = 1 << 20
LOG_END_BYTES = 1 << 18
"""So much of the end of a log is searched for the sentence of an error."""


class Cause(StrEnum):
    """Why an attempt ended."""

    FINISHED = "finished"
    STOPPED = "stopped on request"
    CONFIG_ERROR = "configuration or input wrong"
    CRASH = "crash"
    KILLED = "killed"
    OUT_OF_MEMORY = "out of memory"
    HANG = "hang"
    FROZEN = "rank frozen"
    HOST_LOST = "host lost"
    LAUNCHER_LOST = "launcher lost"
    NOT_STARTED = "failed to start"
    UNSAVED_STOP = "stopped without saving"


# What the run itself says in its event `rank_failed`.
RANK_CAUSES: dict[str, Cause] = {
    RankFailure.KILLED: Cause.KILLED,
    RankFailure.OUT_OF_MEMORY: Cause.OUT_OF_MEMORY,
    RankFailure.HANG: Cause.HANG,
    RankFailure.FROZEN: Cause.FROZEN,
    RankFailure.ERROR: Cause.CRASH,
    RankFailure.HOST_LOST: Cause.HOST_LOST,
}


@dataclass(kw_only=True)
class Attempt:
    """One start of the command, as attempt.json holds it."""

    number: int
    command: list[str]
    """With the values of environment assignments (`NAME=value`) left out."""
    started: str
    """Time of day, for people."""
    ended: str | None = None
    exit_code: int | None = None
    """Of the command; negative: the signal that ended it."""
    cause: Cause | None = None
    reason: str = ""
    """One sentence."""
    run_attempts: list[int] = field(default_factory=list)
    """Their numbers in events.jsonl and metrics.jsonl; none where training did not begin."""
    first_step: int | None = None
    last_step: int | None = None
    checkpoints_before: list[int] = field(default_factory=list)
    checkpoints_after: list[int] = field(default_factory=list)
    gap_before_s: float = 0.0
    """Since the end of the attempt before: the pause between the two."""
    startup_s: float = 0.0
    """Until the first new step; where there was none, until the end."""
    detection_s: float = 0.0
    """From the last line that the run wrote to the end of its last process: failing, being noticed, being ended."""
    wall_s: float = 0.0
    lost_s: dict[str, float] = field(default_factory=dict)
    """Filled in by `account`: redone, detection, restart."""

    def write(self, folder: Path) -> None:
        """Write or replace attempt.json."""
        write_json(folder / ATTEMPT_FILE, asdict(self))


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


# ---- why it ended ----------------------------------------------------------------------------------------------------


def find_cause(
    exit_code: int, events: list[dict[str, Any]], log: Path, *, asked: str | None, oom_kills: int
) -> tuple[Cause, str]:
    """Cause and one sentence, from the events that the attempt wrote, the exit code of its command, and its log.

    The events come first: `deepspeed` returns 0 when its child is killed. `oom_kills`: by the kernel, meanwhile.
    """
    last: dict[str, dict[str, Any]] = {event["event"]: event for event in events}
    if finished := last.get(Event.FINISHED):
        return Cause.FINISHED, f"finished at step {finished.get('step')}"
    number = _signal_of(exit_code)
    if stopped := last.get(Event.STOPPED):
        step, reason = stopped.get("step"), stopped.get("reason")
        # A signal that asks to stop may end the launcher first; its ranks then see the loss of the launcher.
        requested = number is not None or reason != LAUNCHER_LOST
        if asked or (exit_code != 0 and number not in _FATAL and requested):
            by = asked or (number.name if number and reason == LAUNCHER_LOST else reason) or "request"
            return Cause.STOPPED, f"stopped by {by} at step {step}, the state is saved"
        how = f"by {number.name}" if number else "by a signal to its child"
        return Cause.LAUNCHER_LOST, f"the launcher was ended {how}; its ranks saved at step {step}"
    if asked:
        return Cause.UNSAVED_STOP, f"{asked} came, and the run ended without saving"
    if exit_code == ExitCode.CONFIG_ERROR:
        return Cause.CONFIG_ERROR, error_sentence(log) or "exit code 2"
    if failed := last.get(Event.RANK_FAILED):
        cause = RANK_CAUSES.get(failed.get("cause", ""), Cause.CRASH)
        sentence = f"rank {failed.get('rank')} on {failed.get('host')}: {failed.get('reason')}"
        return cause, f"{sentence}: {error_sentence(log)}" if cause is Cause.CRASH else sentence
    return _cause_of_code(exit_code, number, bool(events), log, oom_kills)


_FATAL = {signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
_ENDS_NOTHING = {signal.SIGCHLD, signal.SIGURG, signal.SIGWINCH, signal.SIGCONT}
_ENDS_NOTHING |= {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}


def _cause_of_code(
    exit_code: int, number: signal.Signals | None, began: bool, log: Path, oom_kills: int
) -> tuple[Cause, str]:
    """Where the run itself recorded no ending."""
    sentence = error_sentence(log)
    if number is signal.SIGKILL and oom_kills:
        return Cause.OUT_OF_MEMORY, "a process was killed by the kernel because memory ran out"
    if re.search(r"MemoryError|OutOfMemoryError|[Cc]annot allocate memory|can't allocate memory", sentence):
        return Cause.OUT_OF_MEMORY, sentence
    if number is not None:
        what = "the launcher" if exit_code < 0 else "a rank"
        return Cause.KILLED, f"{what} was ended by {number.name}"
    if exit_code == 0:
        return Cause.LAUNCHER_LOST, sentence or "the command returned 0, but the run had not finished"
    said = sentence or f"exit code {exit_code}, and no word of an error"
    return (Cause.CRASH if began else Cause.NOT_STARTED), said


def _signal_of(exit_code: int) -> signal.Signals | None:
    """The signal that ended the command (negative), its child as a shell says it (128 + n) or deepspeed (256 - n)."""
    for number in (-exit_code, exit_code - 128, 256 - exit_code):
        # 255, which would be SIGHUP, is what ssh and launchers return for errors of their own; srun has codes that
        # would be signals which end no process.
        if number == -exit_code > 0 or (1 < number < 32 and signal.Signals(number) not in _ENDS_NOTHING):
            return signal.Signals(number)
    return None


_ERROR = re.compile(
    r"(?:\[rank\d+\]:\s*)?((?:\S+: )?error: .+|(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b(?:: .*)?)"
)
_FOLLOWING = re.compile(r"Connection closed by peer|Connection reset|Gloo|gloo|CalledProcessError|BrokenPipe")


def error_sentence(log: Path) -> str:
    """The first line at the end of a log that looks like an error; what peers say of a dead rank comes last."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_END_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    found = [
        match.group(1).strip() for line in text.splitlines() if (match := _ERROR.fullmatch(line.strip()))
    ]
    own = [line for line in found if not _FOLLOWING.search(line)]
    return (own or found or [""])[0][:500]


# ---- lost time -------------------------------------------------------------------------------------------------------


def account(attempts: list[Attempt], run_dir: Path) -> dict[str, Any]:
    """Fill in `lost_s` of every attempt; the run's sums by cause, and goodput.

    Wall time is the attempts and the pauses between them. A failed attempt lost the steps that were done again, the
    time until its last process was gone, and the time until the next attempt's first new step.
    """
    done, kept = _step_times(attempts, run_dir)
    by_cause: dict[str, dict[str, float]] = {}
    for attempt, later in zip(attempts, [*attempts[1:], None], strict=True):
        restart_s = (
            later.gap_before_s + (later.startup_s if later.first_step is not None else 0) if later else 0.0
        )
        attempt.lost_s = {
            "redone": sum(done.get(n, 0.0) - kept.get(n, 0.0) for n in attempt.run_attempts),
            "detection": 0.0 if attempt.cause in (Cause.FINISHED, Cause.STOPPED) else attempt.detection_s,
            "restart": restart_s,
        }
        row = by_cause.setdefault(
            str(attempt.cause), {"attempts": 0, "redone": 0, "detection": 0, "restart": 0}
        )
        row["attempts"] += 1
        for name, seconds in attempt.lost_s.items():
            row[name] += seconds
    wall_s = sum(attempt.gap_before_s + attempt.wall_s for attempt in attempts)
    useful_s = sum(kept.get(n, 0.0) for attempt in attempts for n in attempt.run_attempts)
    return {
        "wall_s": wall_s,
        "useful_s": useful_s,
        "goodput_frac": useful_s / wall_s if wall_s > 0 else 0.0,
        "attempts": len(attempts),
        "lost_s_by_cause": by_cause,
    }


def _step_times(attempts: list[Attempt], run_dir: Path) -> tuple[dict[int, float], dict[int, float]]:
    """Seconds of steps by the run's attempt number: all that were done, and those that the run's state is made of."""
    last = attempts[-1]
    limit = float("inf") if last.cause is Cause.FINISHED else max(last.checkpoints_after, default=0)
    done: dict[int, float] = {}
    kept: dict[int, float] = {}
    for line in read_lines(run_dir / METRICS_FILE, kind=str, attempt=int):
        if line["kind"] == "step":
            done[line["attempt"]] = done.get(line["attempt"], 0.0) + line["step_time_s"]
    for record in read_metrics(run_dir):
        if record["step"] <= limit:
            kept[record["attempt"]] = kept.get(record["attempt"], 0.0) + record["step_time_s"]
    return done, kept


def read_attempts(run_dir: Path) -> list[Attempt]:
    """The ended attempts of a run folder, oldest first; one whose supervisor was killed meanwhile is not among them."""
    folders = [path for path in (run_dir / ATTEMPTS_FOLDER).glob("*") if path.name.isdecimal()]
    paths = [path / ATTEMPT_FILE for path in sorted(folders, key=lambda path: int(path.name))]
    attempts = [
        parse(Attempt, read_capped(path, _MAX_ATTEMPT_BYTES), str(path), "the record of an attempt")
        for path in paths
        if path.exists()
    ]
    return [attempt for attempt in attempts if attempt.cause]


def print_summary(summary: dict[str, Any]) -> None:
    """The table of lost time on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Lost time by cause, seconds", title_justify="left")
    for column in ("cause", "attempts", "steps redone", "until noticed", "restart"):
        table.add_column(column, justify="left" if column == "cause" else "right")
    for cause, row in summary["lost_s_by_cause"].items():
        seconds = [f"{row[name]:.1f}" for name in ("redone", "detection", "restart")]
        table.add_row(cause, str(row["attempts"]), *seconds)
    try:
        console = Console()
        console.print(table)
        console.print(
            f"goodput {summary['goodput_frac']:.1%}: {summary['useful_s']:.1f} s of steps that count in "
            f"{summary['wall_s']:.1f} s"
        )
    except OSError:  # the reader of the pipe is gone
        pass
