"""The configuration groups that keep a run alive: `checkpoint`, `loss_guard` and `watchdog`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from pretrain.config.checks import check_positive
from pretrain.config.texts import PathText
from pretrain.errors import ConfigError


class Which(Enum):
    """The checkpoint of a run that a command uses where it is not told a step."""

    newest = "newest"  # the newest good one
    best = "best"  # the one with the lowest held-out loss of the set evaluation.by


class Weights(Enum):
    """The weights of a checkpoint that a command uses."""

    trained = "trained"  # those that the optimizer updated
    ema = "ema"  # their moving average, if the run kept one (ema.decay)


class ThinDtype(Enum):
    """The type of the weights in a thinned checkpoint."""

    fp32 = "fp32"  # the master weights, 4 bytes each
    bf16 = "bf16"  # rounded to 2 bytes each


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every_steps: int = 1000
    """Steps between checkpoints. The last step and a requested stop are always saved."""
    every_minutes: float | None = None
    """Also save when this many minutes have passed since the last save started; null saves by steps only."""
    background: bool = True
    """Write checkpoints while training continues, so that it pauses only for the copy to host memory; false pauses
    training until the checkpoint is written."""
    target: PathText | None = None
    """Folder or URL (such as s3://bucket/run) for the checkpoints; null means the run folder."""
    keep_last: int = 2
    """Number of newest checkpoints to keep."""
    keep_every_steps: int | None = None
    """Keep checkpoints at multiples of this step for good; null keeps none for this reason."""
    keep_best: int = 1
    """Number of additional checkpoints to keep: those with the lowest held-out loss of the set
    `evaluation.by`."""
    mtbf_hours: float | None = None
    """Mean time between failures of the whole job in hours, from which a save interval is advised; null means
    50,000 h / ranks, the rate that Llama 3 reported."""

    def __post_init__(self) -> None:
        check_positive(self, "checkpoint", "every_steps", "keep_last")
        for name in ("keep_every_steps", "every_minutes", "mtbf_hours"):
            if getattr(self, name) is not None:
                check_positive(self, "checkpoint", name)
        if self.keep_best < 0:
            raise ConfigError(f"checkpoint.keep_best={self.keep_best} is negative; allowed: 0 or more")


class SpikeAction(Enum):
    """What to do about an update whose loss is a spike."""

    skip = "skip"  # skip the update
    rollback = "rollback"  # return to the last checkpoint and skip the samples around the spike


@dataclass(kw_only=True, slots=True)
class LossGuardConfig:
    """What to do about loss spikes and non-finite gradients. A non-finite update is always skipped."""

    spike_sigmas: float | None = None
    """Number of robust standard deviations above the recent median from which a loss counts as a spike; null detects no
    spikes."""
    window_steps: int = 128
    """Number of recent updates that give the median and the deviation. No spike is detected before this many
    updates."""
    on_spike: SpikeAction = SpikeAction.skip
    """What to do about a spike."""
    max_skips_in_a_row: int = 10
    """Number of consecutive skipped updates after which the run rolls back."""
    pass_over_steps: int = 50
    """Number of steps whose samples a rollback skips, starting with the first bad step."""
    max_rollbacks: int = 3
    """Number of rollbacks allowed in a run. One more ends the run with exit code 2."""

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
    """How long a rank may make no progress before all ranks write their stacks to the run folder and are killed."""

    startup_s: float = 1800
    """Time limit in seconds for the first step, including imports, rendezvous and loading."""
    step_s: float = 600
    """Time limit in seconds between two signs of progress after the first step: a micro-batch, an update, a save or an
    evaluation batch."""
    lost_s: float = 30
    """Time limit in seconds without a sign of life from a rank's host."""

    def __post_init__(self) -> None:
        check_positive(self, "watchdog", "startup_s", "step_s", "lost_s")
