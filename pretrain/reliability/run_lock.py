"""One run folder belongs to one process at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from pretrain.errors import ConfigError
from pretrain.files import open_lock, refuse_links

LINK_ADVICE = "remove it; checkpoint.target=DIR keeps checkpoints elsewhere"
"""Where a run folder holds a link: someone may have made it to have this run overwrite files of yours."""
WANDB_STARTS = "wandb/*run-*"
"""Folders of a run folder that W&B makes, one per start. It links to its logs in the user's cache there, and writes
nothing into them at a later start."""

_locks: list[IO[str]] = []  # open until the process ends, whatever way that is


def lock_run(run_dir: Path, target: Path | None = None) -> None:
    """Hold the run folder until this process ends. `target`: another folder that checkpoints are written into.

    Raises ConfigError while another process holds it, and for a link that would have us write elsewhere.
    """
    refuse_links(run_dir, run_dir, LINK_ADVICE, leave_out=WANDB_STARTS)
    if target is not None:
        refuse_links(target / "checkpoints", target, LINK_ADVICE)
    handle = open_lock(run_dir / "lock")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.seek(0)
        raise ConfigError(
            f"run_dir={run_dir} is in use by another run (process {handle.read().strip() or 'unknown'}); "
            "stop that one or choose another folder"
        ) from error
    handle.seek(0)
    handle.truncate()
    handle.write(f"{os.getpid()} on {os.uname().nodename}\n")
    handle.flush()
    _locks.append(handle)
