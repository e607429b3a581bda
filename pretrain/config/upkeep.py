"""The configuration groups that keep a run alive: `checkpoint`, `loss_guard` and `watchdog`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from pretrain.config.checks import check_positive
from pretrain.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every_steps: int = 1000
    """Interval; the last step and a requested stop are always saved."""
    every_minutes: float | None = None
    """Saved too when so much time has passed since the last save began; null: by steps only."""
    background: bool = True
    """Write beside training, which stops for the copy to host memory only; false: training waits."""
    target: str | None = None
    """Folder or URL (s3://bucket/run) for the checkpoints; null: the run folder."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_every_steps: int | None = None
    """Checkpoints at multiples of this step are kept for good; null: none."""
    keep_best: int = 1
    """Checkpoints with the lowest held-out losses that are kept too."""
    mtbf_hours: float | None = None
    """Mean time between failures of the whole job, for the advised interval; null: 50,000 h / ranks (Llama 3)."""

    def __post_init__(self) -> None:
        check_positive(self, "checkpoint", "every_steps", "keep_last")
        for name in ("keep_every_steps", "every_minutes", "mtbf_hours"):
            if getattr(self, name) is not None:
                check_positive(self, "checkpoint", name)
        if self.keep_best < 0:
            raise ConfigError(f"checkpoint.keep_best={self.keep_best} is negative; allowed: 0 or more")


class SpikeAction(Enum):
    skip = "skip"  # leave the update out
    rollback = "rollback"  # go back to the last checkpoint and pass over the samples


@dataclass(kw_only=True, slots=True)
class LossGuardConfig:
    """What happens when the loss or the gradient goes wrong. An update that is not finite is always left out."""

    spike_sigmas: float | None = None
    """A loss so many robust standard deviations above the recent median is a spike; null: none is."""
    window_steps: int = 128
    """The median and deviation are of so many recent updates; no spike is seen before so many."""
    on_spike: SpikeAction = SpikeAction.skip
    max_skips_in_a_row: int = 10
    """After so many updates left out in a row the run rolls back."""
    pass_over_steps: int = 50
    """A rollback passes over the samples of so many steps, from the first bad one on."""
    max_rollbacks: int = 3
    """One more ends the run with exit code 2."""

    def __post_init__(self) -> None:
        check_positive(self, "loss_guard", "window_steps", "max_skips_in_a_row", "pass_over_steps")
        if self.spike_sigmas is not None:
            check_positive(self, "loss_guard", "spike_sigmas")
        if self.max_rollbacks < 0:
            raise ConfigError(
                f"loss_guard.max_rollbacks={self.max_rollbacks} is negative; allowed: 0 or more"
            )


@dataclass(kw_only=True, slots=True)
class WatchdogConfig:
    """How long a rank may go without progress before all end, with the stacks of all in the run folder."""

    startup_s: float = 1800
    """Until the first step is done: imports, rendezvous, loading."""
    step_s: float = 600
    """Later: between two marks of progress (a micro batch, an update, a save, an evaluation batch)."""
    lost_s: float = 30
    """Without a sign of life from a rank's host."""

    def __post_init__(self) -> None:
        check_positive(self, "watchdog", "startup_s", "step_s", "lost_s")
