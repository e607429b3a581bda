"""The lock that lets only one process at a time use a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from pretrain.files import hold_lock, refuse_links

LINK_ADVICE = "remove it; checkpoint.target=DIR keeps checkpoints elsewhere"
"""What to do about a link in a run folder, which someone may have made so that this run overwrites your files."""
WANDB_STARTS = "wandb/*run-*"
"""A pattern of the folders that W&B creates in a run folder, one per start.

They hold links to its logs in the user's cache. Those links are harmless, since W&B does not write into the folders
of earlier starts.
"""

_locks: list[IO[str]] = []  # kept open until the process ends, however it ends


def lock_run(run_dir: Path, target: Path | None = None) -> None:
    """Lock the run folder until this process ends. `target` is another folder that checkpoints are written to, if any.

    Raises ConfigError if another process holds the lock, or if a link would redirect what is written to another place.
    """
    refuse_links(run_dir, run_dir, LINK_ADVICE, leave_out=WANDB_STARTS)
    if target is not None:
        refuse_links(target / "checkpoints", target, LINK_ADVICE)
    busy = f"run_dir={run_dir} is in use by another run"
    _locks.append(hold_lock(run_dir / "lock", busy, "stop that one or choose another folder"))
