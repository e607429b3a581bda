"""The configuration groups `optim` and `schedule`: the update of the weights and its learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from pretrain.config.checks import check_fraction, check_positive
from pretrain.errors import ConfigError


class OptimizerName(Enum):
    adamw = "adamw"
    muon = "muon"  # for the matrices of the blocks; adamw for the rest


class ScheduleName(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """Optimizer and gradient clipping."""

    name: OptimizerName = OptimizerName.adamw
    lr: float = 3e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    momentum: float = 0.95
    """Muon: decay of the momentum of the blocks' matrices."""
    weight_decay: float = 0.1
    """Decoupled weight decay, multiplied by the learning rate at each step."""
    decay_norms: bool = False
    """Apply weight decay to the norm gains too."""
    decay_embeddings: bool = False
    """Apply weight decay to the token embedding too (a tied head counts as the embedding)."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm; 0: no clipping."""

    def __post_init__(self) -> None:
        check_positive(self, "optim", "lr", "eps")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optim.{name}={getattr(self, name)} is outside 0 up to below 1")
        for name in ("weight_decay", "max_grad_norm"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"optim.{name}={getattr(self, name)} is negative; allowed: 0 or more")


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate as a function of the step."""

    name: ScheduleName = ScheduleName.cosine
    warmup_steps: int = 0
    """Steps of linear increase from 0 to the peak."""
    decay_steps: int | None = None
    """Length of the decay; null: all steps after the warm-up (for wsd: the last tenth of the run)."""
    min_lr_frac: float = 0.1
    """Learning rate at the end of the decay, as a fraction of the peak."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ConfigError(f"schedule.warmup_steps={self.warmup_steps} is negative; allowed: 0 or more")
        if self.decay_steps is not None:
            check_positive(self, "schedule", "decay_steps")
        check_fraction(self, "schedule", "min_lr_frac")
