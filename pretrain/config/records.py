"""The configuration groups `evaluation` and `logging`: what is measured during a run, and where it is recorded."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from pretrain.config.checks import check_positive
from pretrain.config.texts import ManifestText


class WandbMode(Enum):
    """Where the run is recorded in Weights & Biases."""

    auto = "auto"  # what WANDB_MODE and WANDB_DISABLED say; without them online where an API key is known, else offline
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """How the held-out loss is computed during training."""

    manifest: ManifestText | None = None
    """Path or URL of the manifest.json of a held-out corpus that has the training corpus's tokenizer; null disables
    evaluation."""
    every_steps: int = 1000
    """Steps between evaluations. The last step of the run is always evaluated."""
    max_sequences: int | None = 512
    """Number of sequences per evaluation, taken from the start of the held-out corpus; null takes all of them."""

    def __post_init__(self) -> None:
        check_positive(self, "evaluation", "every_steps")
        if self.max_sequences is not None:
            check_positive(self, "evaluation", "max_sequences")


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """What is recorded of a run in addition to metrics.jsonl and events.jsonl, which are always written."""

    every_steps: int = 10
    """Steps between W&B records and between progress lines. metrics.jsonl gets every step."""
    wandb: WandbMode = WandbMode.auto
    """Where Weights & Biases (W&B) records the run."""
    wandb_project: str | None = None
    """Name of the W&B project; null means WANDB_PROJECT, or `pretrain` where that is not set."""
    wandb_entity: str | None = None
    """W&B user or team; null means WANDB_ENTITY, or the API key's default."""
    wandb_name: str | None = None
    """Name of the run in W&B; null means WANDB_NAME, or the run folder's name."""
    wandb_tags: list[str] = field(default_factory=list)
    """Tags of the run in W&B; an empty list means WANDB_TAGS."""
    peak_flops_per_second: float | None = None
    """Peak FLOP/s of one rank's device, for MFU; null looks it up in the table of known GPUs or, for an unknown device,
    measures it."""
    sample_ledger: bool = False
    """Let each rank record the sample indices of every step and a hash of their tokens."""

    def __post_init__(self) -> None:
        check_positive(self, "logging", "every_steps")
        if self.peak_flops_per_second is not None:
            check_positive(self, "logging", "peak_flops_per_second")
