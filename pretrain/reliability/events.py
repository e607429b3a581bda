"""What can happen to a run: the events, their fields, and the one way in which they get into events.jsonl.

    log = EventLog(run_dir)
    log.append(Event.FINISHED, attempt, step=100)
    {"event": "finished", "attempt": 1, "time": "2026-01-01T00:00:00.000+00:00", "step": 100}

Two processes write: the trainer's rank 0, and a watcher when it ends its rank. Needs no package.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any

from pretrain.reliability.json_lines import JsonLines, read_lines, utc_now

EVENTS_FILE = "events.jsonl"
_COMPUTED_IN = ("world_size", "precision", "precision_decided_by", "precision_before", "kernels")


class Event(StrEnum):
    """An event's name in the file, and the fields that its line may have beside event, attempt and time."""

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
    CHUNK_SUBSTITUTED = (
        *("chunk_substituted", "step", "source", "epoch", "chunk", "first_sample", "substitute", "reason"),
    )
    LOSS_SPIKE = "loss_spike", "step", "loss", "limit"
    ROLLED_BACK = "rolled_back", "step", "from_step", "passed_over_samples", "reason"
    STRAGGLER = "straggler", "step", "rank", "host", "cause", "share"
    SLOW_STEPS = "slow_steps", "step", "reason"
    WANDB_FAILED = "wandb_failed", "reason"
    RANK_FAILED = "rank_failed", "rank", "host", "cause", "reason", "step", "behind"
    STOPPED = "stopped", "step", "reason"
    FINISHED = "finished", "step"


class RankFailure(StrEnum):
    """Why a watcher ended its rank: the `cause` of `rank_failed`."""

    KILLED = "killed"
    OUT_OF_MEMORY = "oom"
    ERROR = "error"
    HANG = "hang"
    FROZEN = "stopped"
    """Stopped by a signal, and not continued."""
    HOST_LOST = "lost"


class EventLog:
    """Appends events to a run's events.jsonl, while another process may do so too."""

    def __init__(self, run_dir: Path) -> None:
        self._lines = JsonLines(run_dir / EVENTS_FILE, shared=True)

    def append(self, event: Event, attempt: int, /, **facts: Any) -> None:
        """Record that something happened in an attempt of the run. `facts` are the event's fields."""
        self._lines.append({"event": event, "attempt": attempt, "time": utc_now()} | facts)

    def close(self) -> None:
        """No event can be recorded after this."""
        self._lines.close()


def read_events(run_dir: str | Path) -> list[dict[str, Any]]:
    """All events of a run, oldest first. Raises ConfigError where the file is damaged."""
    return read_lines(Path(run_dir) / EVENTS_FILE, event=str)


def finished_pattern(step: int) -> str:
    """What `grep -E` finds in the file of a run that has finished at this step: for a host without Python."""
    return rf'"event": "{Event.FINISHED}".*"step": {step}[,}}]'
