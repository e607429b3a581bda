"""How a command ends: its exit codes, and the two errors that a user sees as one sentence, without a traceback."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit code of a process of this project. Any other code is a crash, which may be retried."""

    FINISHED = 0
    CRASHED = 1
    CONFIG_ERROR = 2  # never retried
    STOPPED = 75  # stopped on request with the state saved; the same command resumes (EX_TEMPFAIL)


class ConfigError(ValueError):
    """The configuration or the input is wrong, so running again cannot help. Exit code 2."""


class RunError(RuntimeError):
    """Something outside the program failed, such as a disk or a checkpoint. Its text is shown alone. Exit code 1."""
