"""The events of a run: their names, their fields, and the only code that appends them to events.jsonl.

    log = EventLog(run_dir)
    log.append(Event.FINISHED, attempt, step=100)
    {"event": "finished", "attempt": 1, "time": "2026-01-01T00:00:00.000+00:00", "step": 100}

Two processes write to the file: the trainer's rank 0, and a watcher when it ends its rank. This module needs the
standard library only, so that a watcher starts quickly.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any

from pretrain.reliability.json_lines import JsonLines, read_lines, utc_now

EVENTS_FILE = "events.jsonl"
_COMPUTED_IN = (
    *("world_size", "precision", "precision_decided_by", "precision_before", "kernels"),
    *("parameters", "trained_parameters", "adapters", "base", "packed"),
)


class Event(StrEnum):
    """The name of an event, and the fields that its line may have in addition to event, attempt and time."""

    fields: tuple[str, ...]

    def __new__(cls, name: str, *fields: str) -> Event:
        event = str.__new__(cls, name)
        event._value_ = name
        event.fields = fields
        return event

    MONITORING = (
        *("monitoring", "flops_per_token", "peak_flops_per_second", "peak_source", "wandb", "wandb_run_id"),
    )
    MICRO_BATCH_FOUND = "micro_batch_found", "micro_batch_sequences", "usable_bytes", "probes", "time_s"
    STARTED = "started", "n_steps", "init_from", *_COMPUTED_IN
    RESUMED = "resumed", "step", "path", "config_changed", *_COMPUTED_IN
    CHECKPOINT_SAVED = "checkpoint_saved", "step", "path", "stall_s", "write_s", "bytes", "bytes_per_second"
    CHECKPOINT_FAILED = "checkpoint_failed", "step", "reason"
    CHECKPOINT_DELETED = "checkpoint_deleted", "step", "path"
    CHECKPOINT_PASSED_OVER = "checkpoint_passed_over", "reason"
    CHECKPOINT_SKIPPED = "checkpoint_skipped", "step", "reason"
    CHECKPOINT_INTERVAL_ADVISED = "checkpoint_interval_advised", "interval_s", "cost_s", "mtbf"
    EVALUATED = "evaluated", "step", "losses", "time_s"
    CHUNK_SUBSTITUTED = (
        *("chunk_substituted", "step", "source", "epoch", "chunk", "first_sample", "substitute", "reason"),
    )
    MOMENTS_FILLED = "moments_filled", "step"
    LOSS_SPIKE = "loss_spike", "step", "loss", "limit"
    ROLLED_BACK = "rolled_back", "step", "from_step", "passed_over_samples", "reason"
    STRAGGLER = "straggler", "step", "rank", "host", "cause", "share"
    SLOW_STEPS = "slow_steps", "step", "reason"
    WANDB_FAILED = "wandb_failed", "reason"
    RANK_FAILED = "rank_failed", "rank", "host", "cause", "reason", "step", "behind"
    ADAPTERS_CHECKED = "adapters_checked", "step", "adapters", "trained_parameters", "norm"
    STOPPED = "stopped", "step", "reason"
    FINISHED = "finished", "step", "reason"


class RankFailure(StrEnum):
    """Why a watcher ended its rank. The value is the field `cause` of the event `rank_failed`."""

    KILLED = "killed"
    OUT_OF_MEMORY = "oom"
    ERROR = "error"
    HANG = "hang"
    FROZEN = "stopped"
    """The rank was stopped by a signal, such as SIGSTOP, and nobody continued it."""
    HOST_LOST = "lost"


class EventLog:
    """Appends events to a run's events.jsonl. Other processes may append to it at the same time."""

    def __init__(self, run_dir: Path) -> None:
        self._lines = JsonLines(run_dir / EVENTS_FILE, shared=True)

    def append(self, event: Event, attempt: int, /, **facts: Any) -> None:
        """Record an event of the run's attempt number `attempt`. `facts` are the fields of the event."""
        self._lines.append({"event": event, "attempt": attempt, "time": utc_now()} | facts)

    def close(self) -> None:
        """No event can be recorded after this."""
        self._lines.close()


def read_events(run_dir: str | Path) -> list[dict[str, Any]]:
    """All events of a run, oldest first. Raises ConfigError where the file is damaged."""
    return read_lines(Path(run_dir) / EVENTS_FILE, event=str)


def finished_pattern(step: int) -> str:
    """A pattern for `grep -E` that matches events.jsonl only if the run has finished at this step.

    Slurm job scripts use it, because they run on hosts that may have no Python.
    """
    return rf'"event": "{Event.FINISHED}".*"step": {step}[,}}]'
