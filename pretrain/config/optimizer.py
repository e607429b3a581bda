"""The configuration groups `optim` and `schedule`: the optimizer and the learning rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from pretrain.config.checks import check_fraction, check_positive
from pretrain.errors import ConfigError


class OptimizerName(Enum):
    """The optimizer."""

    adamw = "adamw"
    muon = "muon"  # Muon for the weight matrices of the blocks, AdamW for all other parameters


class ScheduleName(Enum):
    """The shape of the learning rate schedule after the warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"  # warmup-stable-decay: constant, then a linear decay over the last decay_steps


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """The optimizer and gradient clipping."""

    name: OptimizerName = OptimizerName.adamw
    """Which optimizer to use."""
    lr: float = 3e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """AdamW: decay rate of the first moment."""
    beta2: float = 0.95
    """AdamW: decay rate of the second moment."""
    eps: float = 1e-8
    """AdamW: epsilon, which is added to the denominator of the update."""
    momentum: float = 0.95
    """Muon: decay rate of the momentum of the blocks' weight matrices."""
    weight_decay: float = 0.1
    """Decoupled weight decay; it is multiplied by the learning rate at each step."""
    decay_norms: bool = False
    """Also apply weight decay to the gains of the norms."""
    decay_embeddings: bool = False
    """Also apply weight decay to the token embedding. A tied output head counts as the embedding."""
    max_grad_norm: float = 1.0
    """Global L2 norm to which larger gradients are scaled down; 0 disables clipping."""

    def __post_init__(self) -> None:
        check_positive(self, "optim", "lr", "eps")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must be at least 0 and below 1")
        for name in ("weight_decay", "max_grad_norm"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"optim.{name}={getattr(self, name)} is negative; allowed: 0 or more")


@dataclass(kw_only=True, slots=True)
class EmaConfig:
    """An exponential moving average (EMA) of the weights, kept beside them."""

    decay: float | None = None
    """Share of the average that stays at each step, such as 0.999; null keeps no average. In the first steps the share
    is smaller: at most (1 + step) / (10 + step)."""
    every_steps: int = 1
    """Steps between updates of the average, each of which then counts for all of these steps."""

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 < self.decay < 1:
            raise ConfigError(f"ema.decay={self.decay} must be above 0 and below 1")
        check_positive(self, "ema", "every_steps")

    def share_at(self, step: int) -> float | None:
        """Share of the average that stays when it is updated after `step`; None where it is not updated then."""
        if self.decay is None or step % self.every_steps:
            return None
        return min(self.decay, (1 + step) / (10 + step)) ** self.every_steps


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """The learning rate as a function of the step."""

    name: ScheduleName = ScheduleName.cosine
    """Shape of the schedule after the warm-up."""
    warmup_steps: int = 0
    """Number of steps over which the learning rate rises linearly from 0 to the peak."""
    warmup_frac: float | None = None
    """The same as a fraction of the run's steps, instead of warmup_steps; null means that warmup_steps counts."""
    moment_warmup_steps: int = 0
    """Number of steps at learning rate 0 before the schedule begins. They change no weight and fill the optimizer's
    moments, which a model that comes from elsewhere does not bring."""
    decay_steps: int | None = None
    """Number of steps of the decay; null means all steps after the warm-up, or for wsd the last tenth of the run."""
    min_lr_frac: float = 0.1
    """Learning rate at the end of the decay, as a fraction of the peak."""

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "moment_warmup_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"schedule.{name}={getattr(self, name)} is negative; allowed: 0 or more")
        if self.warmup_frac is not None:
            check_fraction(self, "schedule", "warmup_frac")
            if self.warmup_steps:
                raise ConfigError(
                    f"schedule.warmup_steps={self.warmup_steps} and schedule.warmup_frac={self.warmup_frac}: give one"
                )
        if self.decay_steps is not None:
            check_positive(self, "schedule", "decay_steps")
        check_fraction(self, "schedule", "min_lr_frac")

    def decay_start_in(self, n_steps: int) -> int:
        """The last step before the decay of the learning rate begins, in a run of `n_steps`."""
        warmup = self.warmup_in(n_steps)
        if self.name is not ScheduleName.wsd:
            return warmup
        return max(warmup, n_steps - (self.decay_steps or max(1, n_steps // 10)))

    def warmup_in(self, n_steps: int) -> int:
        """Number of steps of the warm-up in a run of `n_steps`."""
        return self.warmup_steps if self.warmup_frac is None else math.ceil(self.warmup_frac * n_steps)
