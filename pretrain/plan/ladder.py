"""A ladder: small runs of several sizes and lengths that predict the loss of a larger one.

`rungs_of` says which runs there are. launch/ladder.py trains them, `pretrain.plan.ladder_fit` fits a law to their
losses and writes the file that `read_fit` reads, and `predict` answers from it, with an interval, and says how far the
answer is beyond the runs. Nothing here imports torch or numpy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from pretrain.config import ModelConfig
from pretrain.errors import ConfigError
from pretrain.files import read_capped
from pretrain.plan.loss import OLMO_BATCH_TOKENS, OLMO_LR, LossLaw, PowerLaw, ladder_parameters
from pretrain.stored import Annotated, FileName, Gt, Le, Line, MinLen, Positive, parse

FIT_FILE = "fit.json"
MAX_FIT_BYTES = 8 << 20
LAW_PARAMETERS = 5
INTERVAL_FRAC = 0.9
"""Share of cases in which the loss of the larger run should lie within the interval."""
LONGEST_WARMUP_FRAC = 0.1
"""Largest part of a run that its warm-up may take. OLMo's warm-up is one token per parameter."""


class Rung(NamedTuple):
    """A run of the ladder before it is trained."""

    name: str
    """Name of its folder."""
    model: ModelConfig
    n_parameters: int
    """Parameters without the token embedding."""
    tokens: int
    batch_sequences: int
    lr: float

    def words(self, sequence_length: int) -> dict[str, str]:
        """What sets this run apart, as keys and values of launch/train.py."""
        batch_tokens = self.batch_sequences * sequence_length
        warmup_tokens = min(self.n_parameters, LONGEST_WARMUP_FRAC * self.tokens)
        shape = ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff")
        return {f"model.{key}": str(getattr(self.model, key)) for key in shape} | {
            "model.d_head": "null",
            "total_tokens": str(self.tokens),
            "global_batch_sequences": str(self.batch_sequences),
            "optim.lr": f"{self.lr:.4g}",
            "schedule.warmup_steps": str(round(warmup_tokens / batch_tokens)),
        }


def rungs_of(
    model: ModelConfig,
    *,
    depths: list[int],
    head_width: int,
    tokens: list[int],
    tokens_per_parameter: list[float],
    lr_multipliers: list[float],
    sequence_length: int,
    batch_multiple: int,
    batch_sequences: int | None,
    lr: float | None,
) -> list[Rung]:
    """The runs of a ladder, the cheapest first.

    A run with `depth` blocks has as many heads, and a feed-forward layer four times as wide as the model. `tokens` are
    lengths of every size, `tokens_per_parameter` lengths that grow with the size. The batch and the learning rate are
    OLMo's, unless they are given; a batch is a multiple of `batch_multiple` sequences. Raises ConfigError where a law
    cannot be fitted to so few runs.
    """
    rungs = []
    for depth in depths:
        width = depth * head_width
        shape = replace(
            model, n_layers=depth, d_model=width, n_heads=depth, n_kv_heads=depth, d_head=None, d_ff=4 * width
        )
        size = ladder_parameters(shape)
        wanted = OLMO_BATCH_TOKENS.at(size) / sequence_length / batch_multiple
        batch = batch_sequences or batch_multiple * max(1, round(wanted))
        for length in [*tokens, *(round(ratio * size) for ratio in tokens_per_parameter)]:
            for factor in lr_multipliers:
                rate = factor * (lr or OLMO_LR.at(size))
                name = f"d{depth}-w{width}-{length}" + ("" if factor == 1 else f"-lr{factor:g}")
                rungs.append(Rung(name, shape, size, length, batch, rate))
    check_design([(rung.n_parameters, rung.tokens) for rung in rungs])
    return sorted(rungs, key=lambda rung: (rung.n_parameters * rung.tokens, rung.lr))


def check_design(points: list[tuple[int, int]]) -> None:
    """Raise ConfigError where runs of these sizes and lengths do not determine the law with one run to spare."""
    different, sizes, lengths = (set(points), {size for size, _ in points}, {length for _, length in points})
    if len(different) <= LAW_PARAMETERS or len(sizes) < 3 or len(lengths) < 3:
        raise ConfigError(
            f"a ladder of {len(different)} runs with {len(sizes)} sizes and {len(lengths)} lengths does not determine "
            f"the law of the loss; it needs {LAW_PARAMETERS + 1} runs with 3 sizes and 3 lengths: give more of depths, "
            "tokens or tokens_per_parameter"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RungResult:
    """A finished run of the ladder."""

    name: FileName
    n_parameters: Positive
    """Parameters without the token embedding."""
    tokens: Positive
    loss: Annotated[float, Gt(0), Le(1e3)]
    """Held-out loss after the last step, in nats per token."""
    lr: Annotated[float, Gt(0), Le(1e3)]
    batch_tokens: Positive


@dataclass(frozen=True, kw_only=True, slots=True)
class Resampled:
    """What a resampling of the runs gave: a law, and by which factor the loss of one more run departs from it."""

    law: LossLaw
    noise_factor: Annotated[float, Gt(0), Le(1e3)]


@dataclass(frozen=True, kw_only=True, slots=True)
class LadderFit:
    """The content of a fit file."""

    format_version: Literal[1]
    metric: Line
    """The metric of the runs that was fitted, such as heldout/loss."""
    vocab_size: Positive
    """Rows of the embedding in all runs. A loss per token says nothing of a run with another tokenizer."""
    rungs: Annotated[list[RungResult], MinLen(LAW_PARAMETERS + 1)]
    """All runs."""
    law: LossLaw
    resampled: Annotated[list[Resampled], MinLen(20)]
    lr: PowerLaw
    """The learning rate by size, through the best run of each size and length."""
    batch_tokens: PowerLaw

    @property
    def departure_frac(self) -> float:
        """How far the losses of the runs are from the law, at most: the best of each size and length counts."""
        best: dict[tuple[int, int], float] = {}
        for rung in self.rungs:
            key = (rung.n_parameters, rung.tokens)
            best[key] = min(rung.loss, best.get(key, math.inf))
        return max(abs(loss / self.law.loss(*key) - 1) for key, loss in best.items())


class Prediction(NamedTuple):
    """What a ladder says of a larger run."""

    loss: float
    low: float
    high: float
    """The interval that should hold the loss of the run in INTERVAL_FRAC of cases."""
    beyond_size: float
    """How many times larger the model is than the largest of the ladder."""
    beyond_tokens: float
    """How many times longer the run is than the longest of the ladder."""
    lr: float
    batch_tokens: float


def read_fit(path: str) -> LadderFit:
    """Read a fit file, or the one in a ladder's folder. Raises ConfigError where it is missing or wrong."""
    file = Path(path) / FIT_FILE if Path(path).is_dir() else Path(path)
    try:
        content = read_capped(file, MAX_FIT_BYTES)
    except OSError as error:
        raise ConfigError(
            f"ladder={path} cannot be read: {error.strerror}; give the {FIT_FILE} that launch/ladder.py wrote"
        ) from error
    return parse(LadderFit, content, str(file), "a fit of launch/ladder.py")


def predict(fit: LadderFit, model: ModelConfig, n_tokens: int) -> Prediction:
    """The loss of a model after a run of `n_tokens`. Raises ConfigError where its vocabulary is not the ladder's."""
    if model.vocab_size != fit.vocab_size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size} differs from the ladder's {fit.vocab_size}, and losses per token of "
            f"different tokenizers cannot be compared; give model.vocab_size={fit.vocab_size}, or train a ladder anew"
        )
    size = ladder_parameters(model)
    losses = sorted(one.law.loss(size, n_tokens) * one.noise_factor for one in fit.resampled)
    outside = int((1 - INTERVAL_FRAC) / 2 * len(losses))
    return Prediction(
        loss=fit.law.loss(size, n_tokens),
        low=losses[outside],
        high=losses[-1 - outside],
        beyond_size=size / max(rung.n_parameters for rung in fit.rungs),
        beyond_tokens=n_tokens / max(rung.tokens for rung in fit.rungs),
        lr=fit.lr.at(size),
        batch_tokens=fit.batch_tokens.at(size),
    )
