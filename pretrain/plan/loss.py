"""Laws of the held-out loss, the batch and the learning rate as functions of a model's size and of its tokens.

    loss = e + a / N^alpha + b / D^beta         (Hoffmann et al., 2022), N parameters and D tokens

`CHINCHILLA` is a published fit of it. `pretrain.plan.ladder` has the fit to a ladder of the user's own runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.arithmetic import count_parameters, parameter_sizes
from pretrain.config import ModelConfig
from pretrain.stored import Annotated, Ge, Le

Coefficient = Annotated[float, Ge(0), Le(1e300)]
Exponent = Annotated[float, Ge(-10), Le(10)]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossLaw:
    """The loss in nats per token of a model with N parameters after D tokens."""

    e: Annotated[float, Ge(0), Le(1e3)]
    """The loss that no size and no number of tokens goes below."""
    a: Coefficient
    alpha: Exponent
    b: Coefficient
    beta: Exponent

    def loss(self, n_parameters: float, n_tokens: float) -> float:
        """The loss at the end of a run."""
        return self.e + self.a / n_parameters**self.alpha + self.b / n_tokens**self.beta


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerLaw:
    """coefficient x N^exponent: a learning rate, or a batch in tokens, for a model with N parameters."""

    coefficient: Coefficient
    exponent: Exponent

    def at(self, n_parameters: float) -> float:
        """The value for a model of this size."""
        return self.coefficient * n_parameters**self.exponent


CHINCHILLA = LossLaw(e=1.8172, a=482.01, alpha=0.3478, b=2085.43, beta=0.3658)
"""The runs of Hoffmann et al. (2022) as fitted again by Besiroglu et al. (2024), arXiv:2404.10102. N counts all
parameters. The text is MassiveText and the vocabulary has 32,000 entries; other text and tokens have other losses."""
OLMO_BATCH_TOKENS = PowerLaw(coefficient=327_680 / 108e6 ** (2 / 3), exponent=2 / 3)
"""Tokens per step of OLMo's ladders: 327,680 (N/108M)^(2/3), after Porian et al. (2024). N leaves out the token
embedding (`ladder_parameters`)."""
OLMO_LR = PowerLaw(coefficient=0.0047 / 2 * 108e6 ** (1 / 3), exponent=-1 / 3)
"""Peak learning rate of AdamW in OLMo's ladders, for a constant rate with a short decay: 0.0047 (N/108M)^(-1/3) / 2."""


def ladder_parameters(model: ModelConfig) -> int:
    """The parameters without the token embedding, as OLMo's ladders count them; a tied output head is left out, too."""
    embedding, _ = parameter_sizes(model)[0]
    return count_parameters(model) - embedding
