"""How a run uses the order: the number of lanes, the samples of each rank, and the end of each source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pretrain.config.data_stages import DataStage, stage_at, tokens_before
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
    order: Order, max_epochs: Sequence[int | None], fixed_samples: int, end_sample: int
) -> list[DataStage]:
    """The order's stages, and a new stage at each point where a source has been read `max_epochs` times.

    From its new stage on, the source is no longer drawn. Samples before `fixed_samples` keep their stages. Raises
    ConfigError if all sources end before `end_sample`.
    """
    stages = order.stages
    ends = []
    for source, most in enumerate(max_epochs):
        if most is not None and source not in stages[-1].ended and order.is_read(source, most, end_sample):
            low, high = 0, end_sample  # invariant: is_read is false at `low` and true at `high`
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if order.is_read(source, most, middle) else (middle, high)
            stage = stages[stage_at(stages, low)]
            ahead = (low - stage.first_sample) // stage.batch_sequences * stage.batch_sequences
            ends.append((max(fixed_samples, stage.first_sample + ahead), source))
    if not ends:
        return stages
    first, source = min(ends)
    at = stage_at(stages, first)
    inserted = replace(stages[at], first_sample=first, start_tokens=None)
    later = [replace(stage, ended=(*stage.ended, source)) for stage in (inserted, *stages[at + 1 :])]
    if not all(sum(stage.drawn_weights) for stage in later):
        raise ConfigError(
            f"all sources of the mixture are read max_epochs times after {tokens_before(stages, first):,} tokens, "
            "before the run ends; raise max_epochs, add a source or shorten the run"
        )
    again = order.with_stages([*stages[: at + 1], *later])
    return end_sources(again, max_epochs, fixed_samples, end_sample)
