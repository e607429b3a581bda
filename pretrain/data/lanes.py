"""How a run uses the order: the number of lanes, the samples of each rank, and the end of each source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pretrain.config.data import DataConfig
from pretrain.config.data_stages import DataStage, Steps, stage_at, tokens_before
from pretrain.data.order import Order, SourceSize
from pretrain.data.permutation import Ints
from pretrain.errors import ConfigError

MIN_ROWS = 16
"""`choose_lanes` gives each lane at least this many chunks per epoch."""


def choose_lanes(sizes: list[SourceSize], global_batch_sequences: int) -> int:
    """V for a new run: the largest divisor of the global batch that leaves each lane enough chunks; at least 1.

    With many lanes, a batch draws from many chunks, and if V is a multiple of the number of ranks, each rank reads
    chunks that no other rank reads. But a lane shuffles only its own chunks, so it should have at least MIN_ROWS of
    them per epoch of every source. V divides the batch, so that all lanes advance at the same pace.
    """
    most = min(global_batch_sequences, min(size.n_chunks for size in sizes) // MIN_ROWS)
    return max((v for v in range(1, most + 1) if global_batch_sequences % v == 0), default=1)


def rank_samples(first: int, count: int, *, lanes: int, rank: int, world_size: int) -> Ints:
    """Global indices of the samples that `rank` reads from a batch of samples [first, first + count): [count / ranks].

    The batch is sorted by (lane, index) and split into equal contiguous parts. So if `count` is a multiple of `lanes`
    (V), and `lanes` is a multiple of `world_size` (R), rank r owns the lanes [r V/R, (r+1) V/R) for the whole run.
    """
    if count % world_size:
        raise ValueError(f"a batch of {count} samples does not split evenly over {world_size} ranks")
    samples = np.arange(first, first + count, dtype=np.int64)
    ordered = samples[np.argsort(samples % lanes, kind="stable")]
    mine = count // world_size
    return ordered[rank * mine : (rank + 1) * mine]


def end_sources(
    order: Order,
    max_epochs: Sequence[int | None],
    fixed_samples: int,
    end_sample: int,
    closes_epochs: int | None = None,
) -> list[DataStage]:
    """The order's stages, and a new stage at each point where a source has been read `max_epochs` times.

    From its new stage on, the source is no longer drawn. Samples before `fixed_samples` keep their stages. If all
    sources end before `end_sample`, the last stage is one that closes `closes_epochs` epochs; where that is None,
    ConfigError is raised.
    """
    stages = order.stages
    limits = [None if source in stages[-1].ended else most for source, most in enumerate(max_epochs)]
    if not order.read_beyond(limits, end_sample):
        return stages
    low, high = 0, end_sample  # invariant: no limit is exceeded before `low`, and one is before `high`
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if order.read_beyond(limits, middle) else (middle, high)
    stage = stages[stage_at(stages, low)]
    ahead = (low - stage.first_sample) // stage.batch_sequences * stage.batch_sequences
    first = max(fixed_samples, stage.first_sample + ahead)
    source = order.read_beyond(limits, high)[0]
    at = stage_at(stages, first)
    inserted = replace(stages[at], first_sample=first, start_tokens=None)
    later = [replace(stage, ended=(*stage.ended, source)) for stage in (inserted, *stages[at + 1 :])]
    if not all(sum(stage.drawn_weights) for stage in later):
        if closes_epochs is not None:
            return _closed(order, stages[: at + 1], inserted, stages[at + 1 :], closes_epochs)
        raise ConfigError(
            f"all sources of the mixture are read max_epochs times after {tokens_before(stages, first):,} tokens, "
            "before the run ends; raise max_epochs, add a source or shorten the run"
        )
    again = order.with_stages([*stages[: at + 1], *later])
    return end_sources(again, max_epochs, fixed_samples, end_sample, closes_epochs)


def end_with_epoch(
    order: Order, sizes: Sequence[SourceSize], n_epochs: int, fixed_samples: int
) -> list[DataStage]:
    """The order's stages up to one that closes `n_epochs` epochs of all sources, after which nothing is left of them.

    Samples before `fixed_samples` keep their stages. Raises ConfigError where these have left the epochs already, or
    where a configured stage would begin in the closing one or later.
    """
    stages = order.stages
    if any(stage.closes_epochs == n_epochs for stage in stages):
        return stages
    if order.read_beyond([n_epochs] * len(sizes), fixed_samples):
        raise ConfigError(
            f"total_epochs={n_epochs} is less than the run has already read of a source; give a larger number, or the "
            "length by total_steps or total_tokens"
        )
    shortest = min(stage.sequence_length for stage in stages)
    most = n_epochs * sum(sequences_of(size, shortest) for size in sizes)
    # So many samples after the last stage began, some lane has left the last epoch of a source, since there are fewer.
    return end_sources(
        order, [n_epochs] * len(sizes), fixed_samples, stages[-1].first_sample + most + 1, n_epochs
    )


def steps_until_epoch(
    stages: Sequence[DataStage], passed_over: Sequence[Sequence[int]], n_epochs: int
) -> int:
    """Number of steps of a run that ends where its stages close `n_epochs` epochs."""
    end = next(stage.end_sample for stage in stages if stage.closes_epochs == n_epochs)
    assert end is not None
    return Steps(stages, passed_over).steps_before(end)


def _closed(
    order: Order, before: list[DataStage], last: DataStage, later: list[DataStage], n_epochs: int
) -> list[DataStage]:
    """The stages `before`, and one that begins where `last` does and closes `n_epochs` epochs.

    Raises ConfigError for a configured stage among the `later` ones.
    """
    for stage in later:
        if stage.start_tokens is not None:
            raise ConfigError(
                f"data.stages: start_tokens={stage.start_tokens} is too late: with total_epochs={n_epochs}, the last "
                f"part of the run begins after {tokens_before(before, last.first_sample):,} tokens; start it earlier"
            )
    closing = replace(last, ended=(), closes_epochs=n_epochs, end_sample=last.first_sample)
    left = order.with_stages([*before, closing]).samples_left()
    return [*before, replace(closing, end_sample=last.first_sample + left)]


def sequences_of(size: SourceSize, sequence_length: int) -> int:
    """Number of sequences of a corpus."""
    full, last = size.sequences_per_chunk(sequence_length)
    return (size.n_chunks - 1) * full + last


def weighted_by_size(data: DataConfig, sizes: Sequence[SourceSize]) -> DataConfig:
    """The configuration with each source's number of sequences as its weight, so that all end together."""
    weights = [float(sequences_of(size, data.sequence_length)) for size in sizes]
    weighted = [replace(source, weight=w) for source, w in zip(data.sources, weights, strict=False)]
    return replace(data, sources=weighted)
