"""The key `objective` and its group `mlm`: what a model learns to predict."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from pretrain.config.checks import check_fraction
from pretrain.errors import ConfigError


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
