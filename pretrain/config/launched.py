"""What the launcher told this process, before any process group exists."""

from __future__ import annotations

import os


def launched_rank() -> int:
    """The rank that the launcher gave this process."""
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int:
    """The number of ranks that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_local_size() -> int | None:
    """The number of ranks that the launcher started on this host, where it says so."""
    given = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))
    return int(given) if given else None
