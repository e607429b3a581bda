"""The configuration groups `evaluation` and `logging`: what is measured of a run and where it is recorded."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from pretrain.config.checks import check_positive


class WandbMode(Enum):
    auto = "auto"  # online when an API key is known, else offline
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """Held-out loss during training."""

    manifest: str | None = None
    """Corpus of held-out text, tokenized with the training corpus's tokenizer; null: no evaluation."""
    every_steps: int = 1000
    """Interval; the last step is always evaluated."""
    max_sequences: int | None = 512
    """Sequences read per evaluation, from the start of the corpus; null: all of them."""

    def __post_init__(self) -> None:
        check_positive(self, "evaluation", "every_steps")
        if self.max_sequences is not None:
            check_positive(self, "evaluation", "max_sequences")


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """What is recorded of a run, beside metrics.jsonl and events.jsonl, which always are."""

    every_steps: int = 10
    """Interval of W&B records and progress lines; metrics.jsonl gets every step."""
    wandb: WandbMode = WandbMode.auto
    wandb_project: str = "pretrain"
    wandb_entity: str | None = None
    wandb_name: str | None = None
    """Name shown in W&B; null: the run folder's name."""
    wandb_tags: list[str] = field(default_factory=list)
    peak_flops_per_second: float | None = None
    """Peak of one rank's device for MFU; null: from the table of known GPUs, else measured."""
    sample_ledger: bool = False
    """Each rank records the sample indices of every step and a hash of their tokens."""

    def __post_init__(self) -> None:
        check_positive(self, "logging", "every_steps")
        if self.peak_flops_per_second is not None:
            check_positive(self, "logging", "peak_flops_per_second")
