"""What is trained: the key `objective` with its group `mlm`, and the group `lora`, adapters beside frozen weights."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum

from omegaconf import MISSING

from pretrain.config.checks import check_at_most, check_fraction, check_positive
from pretrain.errors import ConfigError

TARGETS = ("q", "k", "v", "output", "gate", "up", "down")
"""The matrices of each block that can get an adapter: attention's first, then the feed-forward layer's."""


class Objective(Enum):
    """What the model learns to predict."""

    causal = "causal"  # the next token, from the tokens before it
    mlm = "mlm"  # tokens that are masked, from those on both sides (BERT, Devlin et al., 2019)
    classify = "classify"  # the class of each document, from all its tokens; the corpus has labels


@dataclass(kw_only=True, slots=True)
class MlmConfig:
    """What masked language modeling hides. A chosen token is masked, replaced by a random one, or kept."""

    fraction: float = 0.15
    """Probability that a token is chosen; only chosen tokens are predicted."""
    mask_fraction: float = 0.8
    """Fraction of the chosen tokens that become the mask token."""
    random_fraction: float = 0.1
    """Fraction of the chosen tokens that become a random token; the rest stay as they are."""

    def __post_init__(self) -> None:
        for name in ("fraction", "mask_fraction", "random_fraction"):
            check_fraction(self, "mlm", name)
        if self.fraction == 0:
            raise ConfigError("mlm.fraction=0.0 chooses no token to predict; give more than 0, such as 0.15")
        if self.mask_fraction + self.random_fraction > 1 + 1e-9:  # 0.9 + 0.1 may round to more than 1
            raise ConfigError(
                f"mlm.mask_fraction={self.mask_fraction} and mlm.random_fraction={self.random_fraction} add up to more "
                "than 1; lower one of them"
            )


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters (Hu et al., 2021) on the frozen weights of `init_from`; off by default."""

    r: int = 0
    """Rank of each adapter; 0 trains all weights instead, without adapters."""
    alpha: float = 16.0
    """An adapter's output is multiplied by alpha / r."""
    dropout: float = 0.0
    """Probability of dropping an element of an adapter's input in training."""
    targets: list[str] = field(default_factory=lambda: list(TARGETS))
    """Matrices of each block that get an adapter: any of q, k, v, output, gate, up and down."""
    dora: bool = False
    """Train the length of each row of an adapted matrix separately from its direction (DoRA, Liu et al., 2024)."""
    rank_stabilized: bool = False
    """Multiply by alpha / sqrt(r) instead of alpha / r (Kalajdzievski, 2023)."""

    def __post_init__(self) -> None:
        if self.r == MISSING:
            return
        if self.r < 0:
            raise ConfigError(f"lora.r={self.r} is negative; give 0 for no adapters, or a rank such as 8")
        check_at_most(self, "lora", {"r": 1 << 16})
        check_positive(self, "lora", "alpha")
        check_fraction(self, "lora", "dropout")
        if self.dropout >= 1:
            raise ConfigError(
                f"lora.dropout={self.dropout} drops everything; allowed: at least 0 and below 1"
            )
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            raise ConfigError(
                f"lora.targets={unknown or '[]'} {'does not exist' if unknown else 'leaves nothing to train'}; "
                f"allowed: {', '.join(TARGETS)}"
            )
        usual = {"targets": list(TARGETS)} | {f.name: f.default for f in fields(self) if f.name != "targets"}
        given = [name for name, value in usual.items() if getattr(self, name) != value]
        if given and not self.r:
            raise ConfigError(
                f"lora.{given[0]}={getattr(self, given[0])} has no effect with lora.r=0; give lora.r, such as lora.r=8"
            )
