"""The stages of the data schedule, and which samples each optimizer step takes.

This module uses only integer arithmetic and reads no file.

A stage is a contiguous part of the run with one mixture, one sequence length and one batch size. It always begins at a
step boundary: at the first step at or after its `start_tokens`. Positions are sample indices in the global order. A run
takes the samples one after another, except those that a rollback skips.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from pretrain.config.data import MAX_BATCH_SEQUENCES, MAX_SEQUENCE_LENGTH, DataConfig
from pretrain.errors import ConfigError
from pretrain.stored import Annotated, Ge, Le, MinLen

MAX_EPOCHS = 1 << 20
MAX_SAMPLES = 1 << 48
"""Upper limit of the number of samples in an order: 10^18 tokens in sequences of 4,096."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataStage:
    """One stage of the data schedule; it ends where the next one begins."""

    first_sample: Annotated[int, Ge(0), Le(MAX_SAMPLES)] = 0
    """Index of the stage's first sample in the global order."""
    start_tokens: Annotated[int, Ge(0), Le(1 << 62)] | None = 0
    """Position at which the configuration asks for the stage, in tokens of the order. None marks a stage that is not
    configured: it began because the run resumed with another batch size, or because a source ended."""
    weights: Annotated[tuple[Annotated[float, Ge(0.0), Le(1e30)], ...], MinLen(1)]
    """Configured weight of each source."""
    ended: tuple[Annotated[int, Ge(0), Le(1 << 16)], ...] = ()
    """Indices of the sources that have been read `max_epochs` times and are no longer drawn."""
    sequence_length: Annotated[int, Ge(1), Le(MAX_SEQUENCE_LENGTH)]
    """T: tokens per sequence."""
    batch_sequences: Annotated[int, Ge(1), Le(MAX_BATCH_SEQUENCES)]
    """Samples per optimizer step."""
    closes_epochs: Annotated[int, Ge(1), Le(MAX_EPOCHS)] | None = None
    """N if the stage reads just what is left of the first N epochs of all sources; None for an ordinary stage."""
    end_sample: Annotated[int, Ge(0), Le(MAX_SAMPLES)] | None = None
    """Index after the last sample of a stage that closes epochs; its last step may have fewer samples than the others.
    None for an ordinary stage."""

    @property
    def drawn_weights(self) -> list[float]:
        """Weight of each source as it is drawn: the configured one, or 0 where the source has ended."""
        return [0.0 if k in self.ended else weight for k, weight in enumerate(self.weights)]

    def to_dict(self) -> dict[str, Any]:
        """The stage as plain JSON values."""
        values = asdict(self) | {"weights": list(self.weights), "ended": list(self.ended)}
        if self.closes_epochs is None:  # as in states of runs that began before there was such a stage
            del values["closes_epochs"], values["end_sample"]
        return values

    @property
    def n_steps(self) -> int:
        """Number of steps of a stage that closes epochs."""
        assert self.end_sample is not None
        return -(-(self.end_sample - self.first_sample) // self.batch_sequences)

    def filled(self, sample: int) -> int:
        """The sample, or the end of the stage where it ends before. Samples from there on are empty."""
        return sample if self.end_sample is None else min(sample, max(self.first_sample, self.end_sample))


def plan_stages(
    data: DataConfig, batch_sequences: int, begun: Sequence[DataStage] = (), fixed_samples: int = 0
) -> list[DataStage]:
    """All stages of a run: those that have already `begun`, followed by those that the configuration adds.

    `fixed_samples` is the number of samples that the run has already taken: their order can no longer change. Raises
    ConfigError where the configuration puts a new stage among them.
    """
    wanted = _wanted(data, batch_sequences)
    width = len(wanted[0].weights)
    stages = [replace(stage, weights=_padded(stage.weights, width)) for stage in begun] or [wanted[0]]
    known = {stage.start_tokens for stage in stages}
    current = [stage for stage in wanted if stage.start_tokens in known][-1]
    if begun and current.batch_sequences != stages[-1].batch_sequences:
        last, batch = stages[-1], current.batch_sequences
        stages.append(replace(last, first_sample=fixed_samples, start_tokens=None, batch_sequences=batch))
    last = stages[-1]
    if last.closes_epochs is not None:  # a longer run continues after it
        after = last.first_sample + last.n_steps * last.batch_sequences
        ordinary = replace(last, closes_epochs=None, end_sample=None, start_tokens=None)
        stages.append(replace(ordinary, first_sample=after))
    for stage in wanted:
        if stage.start_tokens in known:
            continue
        last, start = stages[-1], stage.start_tokens or 0
        ahead = start - tokens_before(stages, last.first_sample)
        n_steps = max(0, -(-ahead // (last.batch_sequences * last.sequence_length)))
        first = last.first_sample + n_steps * last.batch_sequences
        if first < fixed_samples:
            raise ConfigError(
                f"data.stages: start_tokens={start} is within the {tokens_before(stages, fixed_samples)} tokens "
                "that the run has already read; start the stage later"
            )
        stages.append(replace(stage, first_sample=first, ended=last.ended))
    return stages


def _wanted(data: DataConfig, batch_sequences: int) -> list[DataStage]:
    """The configured stages with their null values filled in. `first_sample` is not set yet."""
    names = [source.name for source in data.corpora()]
    weights = tuple(float(source.weight) for source in data.corpora())
    stages = [
        DataStage(weights=weights, sequence_length=data.sequence_length, batch_sequences=batch_sequences)
    ]
    for stage in data.stages:
        last = stages[-1]
        if stage.weights is not None:
            weights = tuple(float(stage.weights.get(name, 0.0)) for name in names)
        stages.append(
            DataStage(
                start_tokens=stage.start_tokens,
                weights=weights,
                sequence_length=stage.sequence_length or last.sequence_length,
                batch_sequences=stage.global_batch_sequences or last.batch_sequences,
            )
        )
    return stages


def _padded(weights: tuple[float, ...], width: int) -> tuple[float, ...]:
    return (*weights, *(0.0,) * (width - len(weights)))


def stage_at(stages: Sequence[DataStage], sample: int) -> int:
    """Index of the stage that a sample belongs to."""
    return bisect.bisect_right([stage.first_sample for stage in stages], sample) - 1


def tokens_before(stages: Sequence[DataStage], sample: int) -> int:
    """Number of tokens before a sample in the order, including padding and samples that a rollback skipped."""
    total = 0
    for stage, end in zip(stages, [*(s.first_sample for s in stages[1:]), sample], strict=True):
        total += max(0, stage.filled(min(end, sample)) - stage.first_sample) * stage.sequence_length
    return total


class Step(NamedTuple):
    """One optimizer step: samples [first_sample, end_sample) of T tokens each."""

    number: int
    """Number of the step, counted from 1."""
    first_sample: int
    end_sample: int
    padded_end: int
    """`end_sample`, but where the last step before the end of an epoch has fewer samples than the others: then it is
    filled with empty samples up to here, so that all steps have the same shape."""
    sequence_length: int
    samples_seen: int
    """Number of samples in this step and all earlier ones."""
    tokens_seen: int
    """Number of tokens in this step and all earlier ones."""


class _Span(NamedTuple):
    """A run of consecutive samples taken by steps of one size. `*_before` are the totals up to its first step."""

    first_sample: int
    end_sample: int | None
    stage: DataStage
    steps_before: int
    samples_before: int
    tokens_before: int

    def samples(self, end: int) -> int:
        """Number of samples of the span before `end`, without empty ones."""
        return max(0, self.stage.filled(end) - self.first_sample)

    def steps(self, end: int) -> int:
        """Number of steps of the span that begin before `end`."""
        return -(-(end - self.first_sample) // self.stage.batch_sequences)


class Steps:
    """Which samples each step of a run takes. `passed_over` holds the [first, end) ranges that rollbacks skipped."""

    def __init__(self, stages: Sequence[DataStage], passed_over: Sequence[Sequence[int]] = ()) -> None:
        holes = [(first, end) for first, end in passed_over]
        edges = {stage.first_sample for stage in stages} | {edge for hole in holes for edge in hole}
        borders = sorted(edges)
        self._spans: list[_Span] = []
        steps = samples = tokens = 0
        for first, end in zip(borders, [*borders[1:], None], strict=True):
            if any(start <= first < stop for start, stop in holes):
                continue
            stage = stages[stage_at(stages, first)]
            span = _Span(first, end, stage, steps, samples, tokens)
            self._spans.append(span)
            if end is not None:
                steps += span.steps(end)
                samples += span.samples(end)
                tokens += span.samples(end) * stage.sequence_length

    def __getitem__(self, number: int) -> Step:
        """The step with this number, counted from 1. Step 0 is the empty step before training."""
        if number == 0:
            return Step(0, 0, 0, 0, self._spans[0].stage.sequence_length, 0, 0)
        span = self._spans[bisect.bisect_left(self._spans, number, key=lambda s: s.steps_before) - 1]
        batch, length = span.stage.batch_sequences, span.stage.sequence_length
        first = span.first_sample + (number - span.steps_before - 1) * batch
        end = span.stage.filled(first + batch)
        samples = span.samples(end)
        tokens = span.tokens_before + samples * length
        return Step(number, first, end, first + batch, length, span.samples_before + samples, tokens)

    def step_of(self, sample: int) -> int | None:
        """Number of the step that takes a sample; None where a rollback skipped the sample."""
        span = self._spans[bisect.bisect_right(self._spans, sample, key=lambda s: s.first_sample) - 1]
        if sample < span.first_sample or (span.end_sample is not None and sample >= span.end_sample):
            return None
        return span.steps_before + (sample - span.first_sample) // span.stage.batch_sequences + 1

    def steps_before(self, end: int) -> int:
        """Number of steps that begin before the sample `end`, which is the end of the run."""
        span = self._spans[max(0, bisect.bisect_left(self._spans, end, key=lambda s: s.first_sample) - 1)]
        return span.steps_before + max(
            0, span.steps(end if span.end_sample is None else min(end, span.end_sample))
        )

    def steps_for(self, total_tokens: int) -> int:
        """The smallest number of steps that see at least `total_tokens` tokens."""
        span = self._spans[bisect.bisect_left(self._spans, total_tokens, key=lambda s: s.tokens_before) - 1]
        per_step = span.stage.batch_sequences * span.stage.sequence_length
        return span.steps_before + -(-(total_tokens - span.tokens_before) // per_step)

    def end_after(self, number: int, n_steps: int, stages: Sequence[DataStage]) -> int:
        """The sample at which `n_steps` steps, starting with step `number`, would end if none were skipped."""
        sample = self[number].first_sample
        for _ in range(n_steps):
            sample += stages[stage_at(stages, sample)].batch_sequences
        return sample


def n_steps_of(stages: Sequence[DataStage], total_steps: int | None, total_tokens: int | None) -> int:
    """Length of the run in steps. Samples that a rollback skips do not change it."""
    return total_steps if total_steps is not None else Steps(stages).steps_for(total_tokens or 0)


def micro_batch_of(step_sequences: int, sequence_length: int, world_size: int, tokens: int) -> int:
    """Sequences per rank and forward pass: the largest divisor of the rank's share of the step that fits in `tokens`.

    The result is at least 1, even where a single sequence has more than `tokens` tokens.
    """
    share = step_sequences // world_size
    most = max(1, tokens // sequence_length)
    return max(n for n in range(1, min(share, most) + 1) if share % n == 0)
