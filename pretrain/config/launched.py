"""Reads the variables that the launcher set for this process, which is possible before a process group exists."""

from __future__ import annotations

import os


def launched_rank() -> int:
    """This process's rank; 0 where no launcher set one."""
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int:
    """The number of ranks that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_local_size() -> int | None:
    """The number of ranks that the launcher started on this host; None where it did not set the variable."""
    given = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))
    return int(given) if given else None
