"""Turn old checkpoints into weights only: `python launch/thin.py run_dir=DIR`, then with `apply=true`

Prints what it would do to each checkpoint, and does it with apply=true. A thinned checkpoint can be evaluated,
exported and used as init_from=, but a run cannot go on from it. The newest two stay whole, and with schedule=wsd those
from which a decay begins. The run may go on meanwhile. Exit codes: 0 done, 1 a checkpoint was not thinned and is still
whole, 2 the configuration is wrong.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.command import begin

begin(__name__, interrupted="each checkpoint is either whole or thinned")

from omegaconf import MISSING

from pretrain.config import ThinDtype, run_command
from pretrain.config.texts import PathText
from pretrain.errors import ConfigError, ExitCode
from pretrain.printing import print_error

if TYPE_CHECKING:
    from pretrain.checkpoint.thinning import Candidate


@dataclass(kw_only=True, slots=True)
class ThinConfig:
    """Which checkpoints to thin, and how."""

    run_dir: PathText = MISSING
    """Folder of the run."""
    dtype: ThinDtype = ThinDtype.fp32
    """Type of the weights that stay: fp32, the master weights as they are, or bf16, which rounds them."""
    keep: list[int] = field(default_factory=list)
    """Steps of more checkpoints that stay whole."""
    apply: bool = False
    """Do it. Without it, nothing is changed."""


def main(config: ThinConfig) -> int:
    """Print what would be done and, if asked to, do it."""
    from data_tools.progress import stage
    from pretrain.checkpoint.folder import root_of_run, step_of
    from pretrain.checkpoint.tensors import CheckpointError
    from pretrain.checkpoint.thinning import candidates, remove_leftovers, thin
    from pretrain.files import hold_lock

    run_dir = Path(config.run_dir)
    if not run_dir.is_dir():
        raise ConfigError(f"run_dir={run_dir} does not exist")
    root = root_of_run(run_dir)
    found = candidates(root, run_dir, config.dtype, config.keep)
    print_plan(found)
    chosen = [one for one in found if one.stays is None]
    saved = sum(one.bytes_now - one.bytes_after for one in chosen)
    if not config.apply:
        if chosen:
            print(
                f"apply=true turns {len(chosen)} checkpoints into weights only and frees {saved / 1e6:,.1f} MB"
            )
        return ExitCode.FINISHED
    if not chosen:
        return ExitCode.FINISHED
    freed, failed = 0, 0
    lock = root / "checkpoints" / ".thin.lock"
    with hold_lock(lock, f"run_dir={run_dir} is being thinned", "wait until that is done"):
        remove_leftovers(root)
        with stage("thinning", sum(one.bytes_now for one in chosen)) as progress:
            for one in chosen:
                try:
                    freed += thin(root, step_of(one.path), config.dtype)
                except CheckpointError as error:
                    failed += 1
                    print_error("error", error)
                progress.advance(one.bytes_now)
    print(f"thinned {len(chosen) - failed} of {len(chosen)} checkpoints, which freed {freed / 1e6:,.1f} MB")
    return ExitCode.CRASHED if failed else ExitCode.FINISHED


def print_plan(found: list[Candidate]) -> None:
    """One line per checkpoint."""
    if not found:
        print("there are no checkpoints")
    for one in found:
        now = f"{one.bytes_now / 1e6:,.1f} MB"
        what = (
            f"would become {one.bytes_after / 1e6:,.1f} MB" if one.stays is None else f"stays ({one.stays})"
        )
        print(f"{one.path.name}  {now:>14}  {what}")


if __name__ == "__main__":
    run_command(ThinConfig, main, doc=__doc__)
