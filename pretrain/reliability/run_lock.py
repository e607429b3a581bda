"""One run folder belongs to one process at a time."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from pretrain.files import hold_lock, refuse_links

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
    busy = f"run_dir={run_dir} is in use by another run"
    _locks.append(hold_lock(run_dir / "lock", busy, "stop that one or choose another folder"))
