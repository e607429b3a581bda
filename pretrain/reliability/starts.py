"""The record of each start of the training command: why it ended, its progress, the time it lost. Imports no torch.

A start is one launch of the command by the supervisor. An attempt is the run's own count of how often it has begun to
train, which events.jsonl and metrics.jsonl carry. A start that fails before training makes no attempt, and a command
that restarts its ranks itself makes several.

Durations come from monotonic clocks, the supervisor's and the run's own. Times of day are there for people to read;
nothing is computed from them.
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

# Run folders, the option --attempts and the printed tables call a start an attempt. They keep that name, so that
# existing run folders can still be read and scripts still work.
STARTS_FOLDER = "attempts"
START_FILE = "attempt.json"
OUTPUT_FILE = "output.log"
SUMMARY_FILE = "summary.json"
_MAX_RECORD_BYTES = 1 << 20
LOG_END_BYTES = 1 << 18
"""Only this many bytes at the end of a log are searched for an error message, since a log can be very long."""


class Cause(StrEnum):
    """Why a start ended, in the words of attempt.json and the summary."""

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


# The causes that a run itself reports in its event `rank_failed`, which use other words.
RANK_CAUSES: dict[str, Cause] = {
    RankFailure.KILLED: Cause.KILLED,
    RankFailure.OUT_OF_MEMORY: Cause.OUT_OF_MEMORY,
    RankFailure.HANG: Cause.HANG,
    RankFailure.FROZEN: Cause.FROZEN,
    RankFailure.ERROR: Cause.CRASH,
    RankFailure.HOST_LOST: Cause.HOST_LOST,
}


@dataclass(kw_only=True)
class Start:
    """One start of the command. The names of the fields are the keys of attempt.json."""

    number: int
    """Starts of a run are counted from 1, across supervisors; this number names the start's folder."""
    command: list[str]
    """The words of the command, in which `***` replaces every value that may be secret."""
    started: str
    """The time of day (UTC) at which the command was started."""
    ended: str | None = None
    """The time of day (UTC) at which its last process was gone; None while it runs."""
    exit_code: int | None = None
    """The exit code of the command, or minus the number of the signal that killed it."""
    cause: Cause | None = None
    """Why the start ended; None while it runs, and forever if its supervisor was killed."""
    reason: str = ""
    """One sentence for people that explains the cause."""
    run_attempts: list[int] = field(default_factory=list)
    """The run's own attempt numbers that this start wrote to events.jsonl; empty if training did not begin."""
    first_step: int | None = None
    """The first step that this start completed; None if it completed no step."""
    last_step: int | None = None
    """The last step that this start completed; None if it completed no step."""
    checkpoints_before: list[int] = field(default_factory=list)
    """The steps of the checkpoints that were complete when the command was started."""
    checkpoints_after: list[int] = field(default_factory=list)
    """The steps of the checkpoints that were complete at the end, or that this start saved to a remote store."""
    gap_before_s: float = 0.0
    """Seconds between the end of the previous start and this one; 0 for the first start of a supervisor."""
    startup_s: float = 0.0
    """Seconds from the start of the command to its first completed step, or to its end if it completed no step."""
    detection_s: float = 0.0
    """Seconds from the last line in the run's events or metrics until its last process was gone.

    That covers the failure itself, the time until it was noticed, and the time to end the processes. It is `wall_s`
    if no step was completed.
    """
    wall_s: float = 0.0
    """Seconds from the start of the command until its last process was gone."""
    lost_s: dict[str, float] = field(default_factory=dict)
    """Seconds lost by kind (`redone`, `detection`, `restart`), which `account` fills in."""

    def write(self, folder: Path) -> None:
        """Write or replace attempt.json."""
        write_json(folder / START_FILE, asdict(self))


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


# ---- why it ended ----------------------------------------------------------------------------------------------------


def find_cause(
    exit_code: int, events: list[dict[str, Any]], log: Path, *, asked: str | None, oom_kills: int
) -> tuple[Cause, str]:
    """The cause and the reason of a start's end, from its events, the exit code of its command, and its log.

    The events are believed before the exit code, since `deepspeed` returns 0 when its child is killed. `asked` names
    the signal that asked the supervisor to stop, if one came. `oom_kills` is the number of processes that the kernel
    has killed for lack of memory during the start.
    """
    last: dict[str, dict[str, Any]] = {event["event"]: event for event in events}
    if finished := last.get(Event.FINISHED):
        why = f" ({reason})" if (reason := finished.get("reason")) else ""
        return Cause.FINISHED, f"finished at step {finished.get('step')}{why}"
    number = _signal_of(exit_code)
    if stopped := last.get(Event.STOPPED):
        step, reason = stopped.get("step"), stopped.get("reason")
        # A signal that asks to stop may end the launcher before the ranks have heeded it. The ranks then record the
        # loss of the launcher, though it was a requested stop.
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
    """The cause and the reason where the run itself recorded no end. `began`: whether it recorded any event."""
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
    said = sentence or f"exit code {exit_code}, and no error message in the log"
    return (Cause.CRASH if began else Cause.NOT_STARTED), said


def _signal_of(exit_code: int) -> signal.Signals | None:
    """The signal behind an exit code, if any.

    A code is -n if signal n killed the command itself, 128 + n if a shell reports that it killed a child, and 256 - n
    if deepspeed does.
    """
    for number in (-exit_code, exit_code - 128, 256 - exit_code):
        # 255 is not read as SIGHUP (256 - 1): ssh and launchers return it for errors of their own. Nor does a code
        # count that would mean a signal that ends no process: srun has such codes.
        if number == -exit_code > 0 or (1 < number < 32 and signal.Signals(number) not in _ENDS_NOTHING):
            return signal.Signals(number)
    return None


_ERROR = re.compile(
    r"(?:\[rank\d+\]:\s*)?((?:\S+: )?error: .+|(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b(?:: .*)?)"
)
_FOLLOWING = re.compile(r"Connection closed by peer|Connection reset|Gloo|gloo|CalledProcessError|BrokenPipe")


def error_sentence(log: Path) -> str:
    """The first line near the end of a log that looks like an error message, or nothing.

    Ranks that survive complain about their connections to a dead one. Such a line is taken only if there is no other,
    since it does not tell what the dead rank died of.
    """
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


def account(starts: list[Start], run_dir: Path) -> dict[str, Any]:
    """Fill in `lost_s` of every start. Returns the summary: the run's lost time by cause, and its goodput.

    Wall time is that of the starts and the pauses between them. A failed start lost the steps that had to be repeated
    (`redone`), the time from its last sign of progress until its last process was gone (`detection`), and the time
    from then to the first completed step of the next start (`restart`). Goodput is the fraction of wall time spent on
    steps that the run's final state contains.
    """
    done, kept = _step_times(starts, run_dir)
    by_cause: dict[str, dict[str, float]] = {}
    for start, later in zip(starts, [*starts[1:], None], strict=True):
        restart_s = (
            later.gap_before_s + (later.startup_s if later.first_step is not None else 0) if later else 0.0
        )
        start.lost_s = {
            "redone": sum(done.get(n, 0.0) - kept.get(n, 0.0) for n in start.run_attempts),
            "detection": 0.0 if start.cause in (Cause.FINISHED, Cause.STOPPED) else start.detection_s,
            "restart": restart_s,
        }
        row = by_cause.setdefault(
            str(start.cause), {"attempts": 0, "redone": 0, "detection": 0, "restart": 0}
        )
        row["attempts"] += 1
        for name, seconds in start.lost_s.items():
            row[name] += seconds
    wall_s = sum(start.gap_before_s + start.wall_s for start in starts)
    useful_s = sum(kept.get(n, 0.0) for start in starts for n in start.run_attempts)
    return {
        "wall_s": wall_s,
        "useful_s": useful_s,
        "goodput_frac": useful_s / wall_s if wall_s > 0 else 0.0,
        "attempts": len(starts),
        "lost_s_by_cause": by_cause,
    }


def _step_times(starts: list[Start], run_dir: Path) -> tuple[dict[int, float], dict[int, float]]:
    """Seconds spent on steps, by the run's attempt number: on all steps, and on those that the run's state contains.

    A run that has not finished would resume from its newest checkpoint, so later steps do not count as kept.
    """
    last = starts[-1]
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


def read_starts(run_dir: Path) -> list[Start]:
    """The starts of a run that have ended, oldest first. Raises ConfigError where a record is damaged.

    A start whose supervisor was killed has no recorded end and is left out.
    """
    folders = [path for path in (run_dir / STARTS_FOLDER).glob("*") if path.name.isdecimal()]
    paths = [path / START_FILE for path in sorted(folders, key=lambda path: int(path.name))]
    starts = [
        parse(Start, read_capped(path, _MAX_RECORD_BYTES), str(path), "the record of an attempt")
        for path in paths
        if path.exists()
    ]
    return [start for start in starts if start.cause]


def print_summary(summary: dict[str, Any]) -> None:
    """Print the table of lost time and the goodput to stdout."""
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
    except OSError:  # the reader of the pipe has gone, which must not change the exit code
        pass
