"""The configuration groups `evaluation` and `logging`: what is measured during a run, and where it is recorded."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from enum import Enum

from pretrain.config.checks import check_positive
from pretrain.config.texts import ManifestText, PathText
from pretrain.errors import ConfigError

PLAIN_SET = "heldout"
"""Name of the held-out set that `evaluation.manifest` gives."""
_SET_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_TAKEN = (PLAIN_SET, "source", "ema")  # these stand between slashes in the names of metrics


class WandbMode(Enum):
    """Where the run is recorded in Weights & Biases."""

    auto = "auto"  # what WANDB_MODE and WANDB_DISABLED say; without them online where an API key is known, else offline
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """How the held-out loss and the scores of tasks are computed during training."""

    manifest: ManifestText | None = None
    """Path or URL of the manifest.json of a held-out corpus that has the training corpus's tokenizer; null disables
    evaluation."""
    sets: dict[str, ManifestText] = field(default_factory=dict)
    """More held-out corpora by name, as in {code: DIR, law: DIR}. Each is evaluated on its own."""
    by: str | None = None
    """Name of the set that decides on the best checkpoint and on early stopping; null means `evaluation.manifest`, or
    without it the first of the sets."""
    patience: int | None = None
    """Number of evaluations in a row without a gain after which the run is finished; null trains to the last step."""
    min_gain: float = 0.0
    """Smallest fall of the held-out loss, in nats, since the last gain that counts as a gain."""
    every_steps: int = 1000
    """Steps between evaluations. The last step of the run is always evaluated."""
    max_sequences: int | None = 512
    """Number of sequences per evaluation and set, taken from the start of the held-out corpus; null takes all of
    them."""
    tasks: list[PathText] = field(default_factory=list)
    """Task files (classification and multiple choice) that are scored at each evaluation."""
    task_items: int = 200
    """Number of items of each task that are scored, drawn at random but the same at each evaluation and in each run."""

    def __post_init__(self) -> None:
        check_positive(self, "evaluation", "every_steps")
        check_positive(self, "evaluation", "task_items")
        if self.max_sequences is not None:
            check_positive(self, "evaluation", "max_sequences")
        for name in self.sets:
            if not _SET_NAME.fullmatch(name) or name in _TAKEN:
                raise ConfigError(
                    f"evaluation.sets: {name!r} cannot be the name of a set; use letters, digits, dots, - and _, and "
                    f"none of {', '.join(_TAKEN)}"
                )
        if self.by is not None and self.by not in self.corpora:
            known = ", ".join(self.corpora) or "there is none"
            raise ConfigError(f"evaluation.by={self.by} is no held-out set; the sets are: {known}")
        if self.patience is not None:
            check_positive(self, "evaluation", "patience")
            if not self.corpora:
                raise ConfigError(
                    f"evaluation.patience={self.patience} needs held-out text; give evaluation.manifest=DIR"
                )
        if not 0 <= self.min_gain < math.inf:
            raise ConfigError(f"evaluation.min_gain={self.min_gain} must be 0 or more")

    @property
    def corpora(self) -> dict[str, str]:
        """The manifest of every held-out set by its name, in the order in which they are evaluated."""
        return ({PLAIN_SET: self.manifest} if self.manifest is not None else {}) | self.sets

    @property
    def decides(self) -> str | None:
        """Name of the set that decides on the best checkpoint; None where there is no held-out text."""
        return self.by or next(iter(self.corpora), None)

    @property
    def deciding_metric(self) -> str:
        """The name, after `heldout/`, of the loss that decides on the best checkpoint."""
        return metric_of(self.decides or PLAIN_SET, "loss")

    @staticmethod
    def key_of(name: str) -> str:
        """The key that gives the set of this name."""
        return "evaluation.manifest" if name == PLAIN_SET else f"evaluation.sets.{name}"


def metric_of(set_name: str, metric: str) -> str:
    """The name, after `heldout/`, of a figure of a set."""
    return metric if set_name == PLAIN_SET else f"{set_name}/{metric}"


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
