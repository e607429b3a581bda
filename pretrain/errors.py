"""How a command ends: its exit codes, and the two errors whose text is all that a user needs to read."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a process of this project returns; anything else is a crash and may be retried."""

    FINISHED = 0
    CRASHED = 1
    CONFIG_ERROR = 2  # never retried
    STOPPED = 75  # on request, with the state saved: start again to go on (EX_TEMPFAIL)


class ConfigError(ValueError):
    """The configuration or the input is wrong; running it again changes nothing."""


class RunError(RuntimeError):
    """Something failed while running, and one sentence says all: data, disk, a checkpoint. Exit code 1."""
