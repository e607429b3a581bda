"""The order of samples: every sequence once per epoch, on any number of ranks, whatever the mixture does."""

from __future__ import annotations

import doctest
import hashlib
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import DataConfig, SourceConfig
from pretrain.config.data_stages import DataStage, plan_stages
from pretrain.data import mixture as mixture_module
from pretrain.data import order as order_module
from pretrain.data.lanes import choose_lanes, end_sources, end_with_epoch, rank_samples, sequences_of
from pretrain.data.mixture import PERIOD, Remainder, quotas
from pretrain.data.order import Location, Order, SourceSize
from pretrain.data.permutation import permute, unpermute
from pretrain.errors import ConfigError

LANES = st.integers(1, 12)
SEEDS = st.integers(-(2**63), 2**63 - 1)


def test_the_worked_example_is_true() -> None:
    for module in (order_module, mixture_module):
        failed, tried = doctest.testmod(module)
        assert tried and not failed


@st.composite
def sizes(draw: st.DrawFn, sequence_length: int = 4) -> SourceSize:
    chunk_tokens = sequence_length * draw(st.integers(1, 7))
    return SourceSize(draw(st.integers(1, 40)), chunk_tokens, draw(st.integers(1, chunk_tokens)))


def make(
    size: SourceSize | list[SourceSize],
    stages: list[tuple[int, list[float]]] | None = None,
    *,
    lanes: int = 4,
    window_chunks: int = 3,
    seed: int = 0,
) -> Order:
    all_sizes = size if isinstance(size, list) else [size]
    return Order(
        all_sizes,
        as_stages(stages or [(0, [1.0] * len(all_sizes))]),
        lanes=lanes,
        window_chunks=window_chunks,
        seed=seed,
    )


def as_stages(stages: list[tuple[int, list[float]]], sequence_length: int = 4) -> list[DataStage]:
    return [
        DataStage(
            first_sample=first, weights=tuple(weights), sequence_length=sequence_length, batch_sequences=1
        )
        for first, weights in stages
    ]


def cover(size: SourceSize, lanes: int, epochs: int) -> np.ndarray:
    """Samples enough for every lane to be through with so many epochs of the one source."""
    per_chunk, _ = size.sequences_per_chunk(4)
    rows = -(-epochs * size.n_chunks // lanes)
    return np.arange(lanes * rows * per_chunk, dtype=np.int64)


def pairs(location: Location, mask: np.ndarray) -> list[tuple[int, int]]:
    return sorted(zip(location.chunk[mask].tolist(), location.sequence[mask].tolist(), strict=True))


# --- one source ---


@given(size=sizes(), lanes=LANES, window=st.integers(1, 6), seed=SEEDS)
def test_each_sequence_once_per_epoch(size: SourceSize, lanes: int, window: int, seed: int) -> None:
    found = make(size, lanes=lanes, window_chunks=window, seed=seed).locate(cover(size, lanes, 3))
    per_chunk, per_last = size.sequences_per_chunk(4)
    corpus = [(c, s) for c in range(size.n_chunks - 1) for s in range(per_chunk)]
    corpus += [(size.n_chunks - 1, s) for s in range(per_last)]
    for epoch in range(3):
        assert pairs(found, found.epoch == epoch) == corpus


@given(size=sizes(), lanes=LANES, window=st.integers(1, 6), seed=SEEDS)
def test_a_chunk_is_on_one_lane_per_epoch(size: SourceSize, lanes: int, window: int, seed: int) -> None:
    samples = cover(size, lanes, 3)
    found = make(size, lanes=lanes, window_chunks=window, seed=seed).locate(samples)
    seen = defaultdict(set)
    for lane, epoch, chunk in zip(samples % lanes, found.epoch, found.chunk, strict=True):
        seen[epoch, chunk].add(lane)
    assert {len(lanes_of_chunk) for lanes_of_chunk in seen.values()} == {1}


@given(size=sizes(), lanes=LANES, seed=SEEDS)
def test_lanes_stay_in_step_for_many_epochs(size: SourceSize, lanes: int, seed: int) -> None:
    """All lanes enter an epoch within two chunks' worth of positions: no lane runs ahead, however long the run.

    A lane has the epoch's chunks from one of two adjacent rows on, and had at most one short chunk more.
    """
    epochs, per_chunk = 25, size.sequences_per_chunk(4)[0]
    samples = cover(size, lanes, epochs)
    found = make(size, lanes=lanes, seed=seed).locate(samples)
    by_lane = found.epoch.reshape(-1, lanes)  # [position, lane]
    assert (np.diff(by_lane, axis=0) >= 0).all()
    for epoch in range(epochs):
        entered = (by_lane < epoch).sum(axis=0)
        assert np.ptp(entered) < 2 * per_chunk


@given(n_chunks=st.integers(1, 40), lanes=LANES)
def test_the_short_chunk_visits_every_lane_equally(n_chunks: int, lanes: int) -> None:
    size = SourceSize(n_chunks, 12, 5)
    samples = cover(size, lanes, lanes)
    found = make(size, lanes=lanes).locate(samples)
    short = (found.chunk == n_chunks - 1) & (found.sequence == 0) & (found.epoch < lanes)
    assert (np.bincount(samples[short] % lanes, minlength=lanes) == 1).all()


@given(window=st.integers(1, 8), lanes=LANES, seed=SEEDS)
def test_a_lane_works_on_one_window_at_a_time(window: int, lanes: int, seed: int) -> None:
    size = SourceSize(48 * lanes, 20, 20)  # 48 rows per epoch on every lane, 5 sequences each
    found = make(size, lanes=lanes, window_chunks=window, seed=seed).locate(cover(size, lanes, 1))
    chunks = found.chunk.reshape(-1, lanes)  # [position, lane]
    for lane in range(lanes):
        for start in range(0, 48, window):
            expected = min(window, 48 - start)
            assert len(set(chunks[start * 5 : (start + expected) * 5, lane])) == expected


def test_epochs_seeds_and_windows_are_shuffled_differently() -> None:
    size = SourceSize(64, 64, 64)
    order = make(size, lanes=2, window_chunks=8, seed=1)
    found = order.locate(cover(size, 2, 2))
    first, second = pairs_in_order(found, found.epoch == 0), pairs_in_order(found, found.epoch == 1)
    other = make(size, lanes=2, window_chunks=8, seed=2).locate(cover(size, 2, 1))
    assert first != second
    assert first != pairs_in_order(other, other.epoch == 0)
    assert first != sorted(first)
    # No sequence is likelier than chance to follow its neighbor in the corpus (expected: about 1 in 128).
    assert sum(b == (a[0], a[1] + 1) for a, b in zip(first[::2], first[2::2], strict=False)) < 30


def test_every_epoch_has_its_own_order_of_chunks() -> None:
    found = make(SourceSize(64, 4, 4), lanes=1, window_chunks=1).locate(np.arange(64 * 3))
    by_epoch = found.chunk.reshape(3, 64)
    assert len({tuple(chunks) for chunks in by_epoch.tolist()}) == 3


def test_every_window_has_its_own_order_of_sequences() -> None:
    """One chunk of 32 sequences is a window: no two of 2 seeds x 3 epochs x 2 lanes x 4 rows may be alike."""
    windows = set()
    for seed in (0, 1):
        order = make(SourceSize(8, 128, 128), lanes=2, window_chunks=1, seed=seed)
        sequences = order.locate(np.arange(8 * 32 * 3)).sequence.reshape(12, 32, 2)
        windows |= {tuple(window) for window in sequences.transpose(0, 2, 1).reshape(24, 32).tolist()}
    assert len(windows) == 48


def pairs_in_order(location: Location, mask: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(location.chunk[mask].tolist(), location.sequence[mask].tolist(), strict=True))


@given(data=st.data(), lanes=LANES, seed=SEEDS)
def test_locate_is_a_pure_function_of_each_index(data: st.DataObject, lanes: int, seed: int) -> None:
    both = [data.draw(sizes()), data.draw(sizes())]
    stages = [(0, [1.0, 2.0]), (5 * lanes, [3.0, 1.0])]
    samples = np.array(data.draw(st.lists(st.integers(0, 10**12), min_size=1, max_size=20)), np.int64)
    together = make(both, stages, lanes=lanes, seed=seed).locate(samples)
    again = make(both, stages, lanes=lanes, seed=seed)
    assert together.request.tolist() == list(range(len(samples)))
    for field, values in zip(Location._fields[:5], together[:5], strict=True):
        alone = [int(getattr(again.locate(samples[i : i + 1]), field)[0]) for i in range(len(samples))]
        assert values.tolist() == alone


def test_indices_far_beyond_any_run() -> None:
    """1e12 samples of a corpus of 57 million chunks: no overflow, everything within its bounds."""
    size = SourceSize(57_000_000, 2**18, 1234)
    order = Order([size], as_stages([(0, [1.0])], 2048), lanes=1536, window_chunks=32, seed=7)
    samples = np.random.default_rng(0).integers(0, 10**12, 2000)
    found = order.locate(samples)
    per_epoch = (size.n_chunks - 1) * 128 + 1
    assert ((found.chunk >= 0) & (found.chunk < size.n_chunks)).all()
    assert ((found.sequence >= 0) & (found.sequence < 128)).all()
    assert (np.abs(found.epoch - samples / per_epoch) < 1.001).all()


def test_the_order_is_what_it_was() -> None:
    """Existing runs resume by this function: another result is another order, and needs a new schema number."""
    both = [SourceSize(101, 4096, 1000), SourceSize(40, 4096, 4096)]
    stages = as_stages([(0, [0.7, 0.3]), (1600, [0.2, 0.8])], 512)
    order = Order(both, stages, lanes=8, window_chunks=5, seed=42)
    found = np.stack(order.locate(np.arange(20_000))[:4]).astype("<i8")
    assert hashlib.sha256(found.tobytes()).hexdigest()[:16] == "215a4bd8f216be1d"


# --- mixtures and stages ---

WEIGHTS = st.lists(st.floats(0.001, 1.0), min_size=1, max_size=5)


@given(weights=st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1e6)), min_size=1, max_size=30))
def test_quotas_follow_the_weights(weights: list[float]) -> None:
    if not any(weights):
        with pytest.raises(ConfigError, match="no positive sum"):
            quotas(weights)
        return
    counts = quotas(weights)
    exact = np.array(weights) / sum(weights) * PERIOD
    assert sum(counts) == PERIOD
    assert all((count == 0) == (weight == 0) for count, weight in zip(counts, weights, strict=True))
    rare = int(((exact > 0) & (exact < 1)).sum())  # each of these is raised to 1, at others' cost
    assert (np.abs(counts - exact) <= 1 + rare).all()


@settings(max_examples=15)
@given(weights=WEIGHTS, lane=st.integers(0, 6))
def test_mixture_is_exact_over_a_period_and_never_drifts(weights: list[float], lane: int) -> None:
    k = len(weights)
    order = make([SourceSize(10 + s, 16, 16) for s in range(k)], [(0, weights)], lanes=7)
    share = np.array(quotas(weights)) / PERIOD
    for first in (0, 12_345, 10**9):  # positions on the lane
        positions = first + np.arange(PERIOD)
        source = order.locate(positions * 7 + lane).source
        counts = np.cumsum(source[:, None] == np.arange(k), axis=0)  # [P, K]
        assert counts[-1].tolist() == quotas(weights)
        assert np.abs(counts - share * np.arange(1, PERIOD + 1)[:, None]).max() <= k


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.67, 0.2, 0.03, 0.1], [0.25] * 4])
def test_every_batch_has_its_share_of_each_source(weights: list[float]) -> None:
    """The lanes are rotated against each other: without it, a batch of the first mixture had one source only."""
    lanes = 256
    order = make([SourceSize(5000, 16, 16) for _ in weights], [(0, weights)], lanes=lanes)
    source = order.locate(np.arange(300 * lanes)).source.reshape(-1, lanes)
    counts = (source[:, :, None] == np.arange(len(weights))).sum(axis=1)  # [batch, K]
    assert np.abs(counts - lanes * np.array(weights)).max() < 10  # chance alone: over 20


@settings(max_examples=40)
@given(data=st.data(), lanes=LANES, seed=SEEDS)
def test_stages_neither_lose_nor_repeat_a_sample(data: st.DataObject, lanes: int, seed: int) -> None:
    """On each lane a source's samples come in the same order as if it were the only source, whatever the stages do."""
    k = data.draw(st.integers(1, 3))
    all_sizes = [data.draw(sizes()) for _ in range(k)]
    weight = st.lists(st.sampled_from([0.0, 0.3, 1.0, 2.5]), min_size=k, max_size=k).filter(any)
    rows = data.draw(st.lists(st.integers(0, 400), max_size=3).map(sorted))
    stages = [(row * lanes, data.draw(weight)) for row in [0, *rows]]
    samples = np.arange(500 * lanes)
    found = make(all_sizes, stages, lanes=lanes, seed=seed).locate(samples)
    for source in range(k):
        alone = make(all_sizes, [(0, [float(s == source) for s in range(k)])], lanes=lanes, seed=seed)
        reference = alone.locate(samples)
        for lane in range(lanes):
            mine = (samples % lanes == lane) & (found.source == source)
            n = int(mine.sum())
            on_lane = samples % lanes == lane
            for field in ("epoch", "chunk", "sequence"):
                assert (getattr(found, field)[mine] == getattr(reference, field)[on_lane][:n]).all()


def test_stages_have_their_weights() -> None:
    both = [SourceSize(100, 16, 16), SourceSize(100, 16, 16)]
    order = make(both, [(0, [1.0, 0.0]), (400, [1.0, 3.0]), (70_400, [0.0, 1.0])], lanes=4)
    source = order.locate(np.arange(80_000)).source
    assert source[:400].sum() == 0
    assert abs(source[400:70_400].mean() - 0.75) < 1e-3
    assert source[70_400:].all()


def test_a_stage_may_follow_a_whole_number_of_periods_later() -> None:
    """The counts carried into a stage hold over many periods of the one before."""
    both = [SourceSize(37, 16, 9), SourceSize(11, 16, 16)]
    change = 3 * (5 * PERIOD + 321)
    order = make(both, [(0, [0.3, 0.7]), (change, [0.6, 0.4])], lanes=3)
    alone = make(both, [(0, [1.0, 0.0])], lanes=3)
    positions = np.arange(5 * PERIOD + 321 + 1000)
    found = order.locate(positions * 3 + 1)
    mine = found.source == 0
    reference = alone.locate(np.arange(int(mine.sum())) * 3 + 1)
    assert (found.epoch[mine] == reference.epoch).all()
    assert (found.chunk[mine] == reference.chunk).all()
    assert (found.sequence[mine] == reference.sequence).all()


@pytest.mark.parametrize("starts", [[4], [0, 8, 4]])
def test_stages_begin_one_after_another_from_0(starts: list[int]) -> None:
    with pytest.raises(ValueError, match="increasing samples from 0"):
        make(SourceSize(5, 16, 16), [(start, [1.0]) for start in starts], lanes=4)


# --- longer sequences ---


@st.composite
def growing(draw: st.DrawFn) -> tuple[list[SourceSize], list[DataStage], int]:
    """Sources, stages whose sequences grow from 2 tokens to 16, lanes."""
    lanes, k = draw(st.integers(1, 5)), draw(st.integers(1, 2))
    all_sizes = [SourceSize(draw(st.integers(1, 12)), 48, draw(st.integers(1, 48))) for _ in range(k)]
    lengths = [2, *draw(st.lists(st.sampled_from([2, 4, 8, 16]), min_size=1, max_size=4).map(sorted))]
    weight = st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=k, max_size=k).filter(any)
    stages, first = [], 0
    for length in lengths:
        weights = tuple(draw(weight))
        stages.append(
            DataStage(first_sample=first, weights=weights, sequence_length=length, batch_sequences=1)
        )
        first += draw(st.integers(0, 60))
    last = replace(stages[-1], first_sample=first, weights=(1.0,) * k)
    return all_sizes, [*stages, last], lanes


def tokens_read(size: SourceSize, found: Location, mask: np.ndarray) -> list[tuple[int, int, int]]:
    """(epoch, chunk, token) of the pieces that the mask selects."""
    tokens = []
    for epoch, chunk, sequence, length in zip(
        *(values[mask].tolist() for values in (found.epoch, found.chunk, found.sequence, found.length)),
        strict=True,
    ):
        has = size.last_chunk_tokens if chunk == size.n_chunks - 1 else size.chunk_tokens
        tokens += [(epoch, chunk, t) for t in range(sequence * length, min((sequence + 1) * length, has))]
    return tokens


@settings(max_examples=150)
@given(case=growing(), window=st.integers(1, 4), seed=SEEDS)
def test_longer_sequences_neither_lose_nor_repeat_a_token(
    case: tuple[list[SourceSize], list[DataStage], int], window: int, seed: int
) -> None:
    all_sizes, stages, lanes = case
    order = Order(all_sizes, stages, lanes=lanes, window_chunks=window, seed=seed)
    epoch_tokens = max(size.n_chunks for size in all_sizes) * 48
    end = stages[-1].first_sample + 3 * len(all_sizes) * lanes * (epoch_tokens // 2)
    found = order.locate(np.arange(end))
    lengths = np.array([stage.sequence_length for stage in stages])
    at = np.searchsorted([stage.first_sample for stage in stages], np.arange(end), side="right") - 1
    taken = np.bincount(found.request, weights=found.length, minlength=end)
    assert (taken <= lengths[at]).all(), "no more pieces than a sequence holds"
    for source, size in enumerate(all_sizes):
        read = tokens_read(size, found, found.source == source)
        assert len(set(read)) == len(read), "a token was read twice in an epoch"
        whole = {(0, c, t) for c in range(size.n_chunks - 1) for t in range(size.chunk_tokens)}
        whole |= {(0, size.n_chunks - 1, t) for t in range(size.last_chunk_tokens)}
        assert whole <= set(read), "a token of the first epoch was never read"


@settings(max_examples=50)
@given(case=growing(), window=st.integers(1, 4), seed=SEEDS, data=st.data())
def test_a_stage_to_come_changes_nothing_before_it(
    case: tuple[list[SourceSize], list[DataStage], int], window: int, seed: int, data: st.DataObject
) -> None:
    all_sizes, stages, lanes = case
    kept = data.draw(st.integers(1, len(stages) - 1))
    before = np.arange(stages[kept].first_sample)
    whole = Order(all_sizes, stages, lanes=lanes, window_chunks=window, seed=seed).locate(before)
    part = Order(all_sizes, stages[:kept], lanes=lanes, window_chunks=window, seed=seed).locate(before)
    assert all((a == b).all() for a, b in zip(whole, part, strict=True))


@settings(max_examples=60)
@given(case=growing(), window=st.integers(1, 4), seed=SEEDS, data=st.data())
def test_every_reading_of_a_chunk_is_found(
    case: tuple[list[SourceSize], list[DataStage], int], window: int, seed: int, data: st.DataObject
) -> None:
    all_sizes, stages, lanes = case
    order = Order(all_sizes, stages, lanes=lanes, window_chunks=window, seed=seed)
    end = stages[-1].first_sample + data.draw(st.integers(0, 300))
    source = data.draw(st.integers(0, len(all_sizes) - 1))
    chunk = data.draw(st.integers(0, all_sizes[source].n_chunks - 1))
    where = order.locate(np.arange(end))
    mine = (where.source == source) & (where.chunk == chunk)
    expected = sorted(
        zip(
            *(v[mine].tolist() for v in (where.request, where.sequence, where.epoch, where.length)),
            strict=True,
        )
    )
    found = order.find(source, chunk, end)
    assert sorted(zip(*(values.tolist() for values in found), strict=True)) == expected
    assert (np.diff(found.sample) >= 0).all()


def test_a_chunk_that_each_lane_reads_in_an_epoch_of_its_own_is_found() -> None:
    """Three lanes begin the only chunk, and none has read a whole one: these are three epochs."""
    stages = [DataStage(first_sample=0, weights=(1.0,), sequence_length=2, batch_sequences=1)]
    found = Order([SourceSize(1, 48, 3)], stages, lanes=3, window_chunks=1, seed=0).find(0, 0, 3)
    assert found.sample.tolist() == found.epoch.tolist() == [0, 1, 2]


def test_sequences_grow_at_the_next_window() -> None:
    """One lane, windows of two chunks of four short sequences: after five of them the window's other three come first,
    two to a long sequence, then the next window in long ones."""
    size = SourceSize(6, 16, 16)
    stages = [
        DataStage(first_sample=0, weights=(1.0,), sequence_length=4, batch_sequences=1),
        DataStage(first_sample=5, weights=(1.0,), sequence_length=8, batch_sequences=1),
    ]
    found = Order([size], stages, lanes=1, window_chunks=2, seed=3).locate(np.arange(5, 11))
    assert found.request.tolist() == [0, 0, 1, 2, 3, 4, 5]
    assert found.length.tolist() == [4, 4, 4, 8, 8, 8, 8]
    short = make(size, lanes=1, window_chunks=2, seed=3).locate(np.arange(8))
    assert found.chunk[:3].tolist() == short.chunk[5:].tolist()
    assert found.sequence[:3].tolist() == short.sequence[5:].tolist()
    assert len(set(found.chunk[3:].tolist())) == 2


# --- permutations ---


@given(ns=st.lists(st.integers(1, 70), min_size=1, max_size=8), seed=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection_of_any_size(ns: list[int], seed: int) -> None:
    x = np.concatenate([np.arange(n) for n in ns])
    keys = np.repeat(np.array([(seed + j) % 2**64 for j in range(len(ns))], np.uint64), ns)
    y = permute(x, np.repeat(ns, ns), keys)
    for part, n in zip(np.split(y, np.cumsum(ns)[:-1]), ns, strict=True):
        assert sorted(part.tolist()) == list(range(n))
    assert unpermute(y, np.repeat(ns, ns), keys).tolist() == x.tolist()


@pytest.mark.parametrize("n", [2**20, 2**20 + 1, 1_000_003])
def test_permute_large(n: int) -> None:
    y = permute(np.arange(n), np.full(n, n), np.array([99], np.uint64))
    assert (np.bincount(y, minlength=n) == 1).all()
    assert abs(np.corrcoef(np.arange(n), y)[0, 1]) < 0.01


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_permute_reaches_every_permutation(n: int) -> None:
    """Small windows too: all n! orders occur, and each value comes first about equally often."""
    keys = np.random.default_rng(1).integers(0, 2**64, 20_000, np.uint64)
    y = permute(np.tile(np.arange(n), len(keys)), np.full(n * len(keys), n), np.repeat(keys, n)).reshape(
        -1, n
    )
    assert len(np.unique(y, axis=0)) == {2: 2, 3: 6, 4: 24, 5: 120, 6: 720}[n]
    assert np.abs(np.bincount(y[:, 0]) * n / len(keys) - 1).max() < 0.15


# --- ranks ---


@given(
    lanes=LANES,
    batch=st.sampled_from([12, 24, 60]),
    first=st.integers(0, 10**6),
    world_size=st.sampled_from([1, 2, 3, 4, 6, 12]),
)
def test_ranks_share_a_batch(lanes: int, batch: int, first: int, world_size: int) -> None:
    parts = [
        rank_samples(first, batch, lanes=lanes, rank=r, world_size=world_size) for r in range(world_size)
    ]
    assert {len(part) for part in parts} == {batch // world_size}
    assert sorted(np.concatenate(parts).tolist()) == list(range(first, first + batch))
    if batch % lanes == 0 and lanes % world_size == 0:
        own = lanes // world_size
        assert all(set(part % lanes // own) == {r} for r, part in enumerate(parts))


def test_changing_the_number_of_ranks_changes_no_batch() -> None:
    read = []
    for step, world_size in enumerate([2, 2, 1, 3, 3, 4]):
        for rank in range(world_size):
            read += rank_samples(step * 12, 12, lanes=6, rank=rank, world_size=world_size).tolist()
    assert sorted(read) == list(range(72))


def test_a_batch_that_does_not_split_is_refused() -> None:
    with pytest.raises(ValueError, match="does not split evenly over 3 ranks"):
        rank_samples(0, 16, lanes=4, rank=0, world_size=3)


@pytest.mark.parametrize(
    ("n_chunks", "batch", "lanes"),
    [([512], 32, 32), ([512], 48, 24), ([511], 32, 16), ([10**6, 200], 64, 8), ([3], 32, 1), ([10**6], 7, 7)],
)
def test_choose_lanes(n_chunks: list[int], batch: int, lanes: int) -> None:
    assert choose_lanes([SourceSize(n, 4096, 4096) for n in n_chunks], batch) == lanes


# --- sources that join, and that end ---


def test_a_source_that_joins_leaves_the_past_as_it_was() -> None:
    old = [SourceSize(50, 16, 7), SourceSize(20, 16, 16)]
    new = [*old, SourceSize(30, 16, 3)]
    before = make(old, [(0, [0.5, 0.5])]).locate(np.arange(1200))
    after = make(new, [(0, [0.5, 0.5, 0.0]), (1200, [0.4, 0.3, 0.3])]).locate(np.arange(2400))
    assert all((a == b[:1200]).all() for a, b in zip(before, after, strict=True))
    assert (after.source[1200:] == 2).any()


def first_epochs_over(order: Order, source: int, epochs: int, end: int) -> int | None:
    """The first sample that is drawn from a source beyond so many epochs."""
    found = order.locate(np.arange(end))
    beyond = np.flatnonzero((found.source == source) & (found.epoch >= epochs))
    return int(found.request[beyond[0]]) if len(beyond) else None


@settings(max_examples=60)
@given(data=st.data(), lanes=LANES, most=st.integers(1, 3), batch=st.integers(1, 9))
def test_a_source_ends_after_max_epochs(data: st.DataObject, lanes: int, most: int, batch: int) -> None:
    both = [data.draw(sizes()), SourceSize(50, 16, 16)]
    stages = [DataStage(weights=(0.5, 0.5), sequence_length=4, batch_sequences=batch)]
    order = Order(both, stages, lanes=lanes, window_chunks=3, seed=1)
    end = 9000
    ended = end_sources(order, [most, None], 0, end)
    over = first_epochs_over(order, 0, most, end)
    if over is None:
        assert ended == stages
        return
    assert [stage.ended for stage in ended] == [(), (0,)]
    assert ended[1].first_sample == over // batch * batch, (
        "it ends with the last step that keeps to its epochs"
    )
    assert first_epochs_over(order.with_stages(ended), 0, most, end) is None
    again = end_sources(order.with_stages(ended), [most, None], 0, end)
    assert again == ended


def test_a_run_longer_than_all_its_sources_is_refused() -> None:
    both = [SourceSize(5, 16, 16), SourceSize(10, 16, 16)]
    order = make(both, lanes=2)
    with pytest.raises(ConfigError, match=r"all sources .* max_epochs times after 2\d\d tokens"):
        end_sources(order, [1, 1], 0, 100)


# --- runs that end with an epoch ---


@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=20).filter(any))
def test_a_remainder_deals_each_sample_once_and_all_cells_end_together(counts: list[int]) -> None:
    rest = Remainder(np.array(counts))
    index = np.arange(rest.total)
    cell, drawn = rest.dealt(index)
    assert rest.total == sum(counts)
    for which, count in enumerate(counts):
        mine = cell == which
        assert drawn[mine].tolist() == list(range(count))
        assert rest.sample(which, drawn[mine]).tolist() == index[mine].tolist()
        left = [rest.total - int(i) for i in index[mine]]
        assert all(a <= (n + 1) * np.count_nonzero(counts) for n, a in enumerate(reversed(left)))
    for i in (*index.tolist(), rest.total + 5):
        assert rest.drawn_before(i).tolist() == np.bincount(cell[:i], minlength=len(counts)).tolist()


def exactly(all_sizes: list[SourceSize], n_epochs: int) -> dict[tuple[int, int, int, int], int]:
    """Each (source, epoch, chunk, token) of the first epochs, once."""
    return {
        (source, epoch, chunk, token): 1
        for source, size in enumerate(all_sizes)
        for epoch in range(n_epochs)
        for chunk in range(size.n_chunks)
        for token in range(size.last_chunk_tokens if chunk == size.n_chunks - 1 else size.chunk_tokens)
    }


def counted(all_sizes: list[SourceSize], found: Location) -> dict[tuple[int, int, int, int], int]:
    return Counter(
        (source, *token)
        for source, size in enumerate(all_sizes)
        for token in tokens_read(size, found, found.source == source)
    )


@settings(max_examples=40)
@given(
    case=growing(),
    batch=st.integers(1, 9),
    most=st.integers(1, 3),
    window=st.integers(1, 4),
    seed=SEEDS,
    data=st.data(),
)
def test_a_run_that_ends_with_an_epoch_reads_each_token_exactly_so_often(
    case: tuple[list[SourceSize], list[DataStage], int],
    batch: int,
    most: int,
    window: int,
    seed: int,
    data: st.DataObject,
) -> None:
    """Whatever lanes, batch and growth of the sequences. Then it is made longer, and ends with another epoch."""
    all_sizes, stages, lanes = case
    weights = tuple(float(sequences_of(size, 2)) for size in all_sizes)
    stages = [
        replace(s, first_sample=s.first_sample * batch, weights=weights, batch_sequences=batch)
        for s in stages
    ]
    stages = [replace(s, start_tokens=0 if n == 0 else None) for n, s in enumerate(stages)]
    order = Order(all_sizes, stages, lanes=lanes, window_chunks=window, seed=seed)
    ended = end_with_epoch(order, all_sizes, most, 0)
    closed = order.with_stages(ended)
    end = ended[-1].end_sample
    found = closed.locate(np.arange(end + 2 * batch))
    assert sorted(set(found.request.tolist())) == list(range(end)), (
        "no sample is empty before the end, all after it"
    )
    assert counted(all_sizes, found) == exactly(all_sizes, most)
    source = data.draw(st.integers(0, len(all_sizes) - 1))
    chunk = data.draw(st.integers(0, all_sizes[source].n_chunks - 1))
    mine = (found.source == source) & (found.chunk == chunk)
    places = (v[mine].tolist() for v in (found.request, found.sequence, found.epoch, found.length))
    readings = closed.find(source, chunk, end)
    assert sorted(zip(*(v.tolist() for v in readings), strict=True)) == sorted(zip(*places, strict=True))
    assert end_with_epoch(closed, all_sizes, most, 0) == ended
    longer = plan_further(ended)
    more = end_with_epoch(order.with_stages(longer), all_sizes, most + 1, end)
    found = order.with_stages(more).locate(np.arange(more[-1].end_sample))
    assert counted(all_sizes, found) == exactly(all_sizes, most + 1)


def plan_further(stages: list[DataStage]) -> list[DataStage]:
    """As a run that has been read to its end plans to continue."""
    length, batch = stages[-1].sequence_length, stages[-1].batch_sequences
    data = DataConfig(
        sources=[SourceConfig(name=str(k)) for k in range(len(stages[-1].weights))], sequence_length=length
    )
    return plan_stages(data, batch, stages, stages[-1].end_sample)


def test_the_issues_run_of_an_epoch_over_32_lanes_loses_and_repeats_nothing() -> None:
    """Without its own end, such a run read 45 of 6,730 sequences twice and 45 never."""
    size = SourceSize(6730 // 16 + 1, 16 * 512, 10 * 512)
    stage = DataStage(weights=(1.0,), sequence_length=512, batch_sequences=32)
    order = Order([size], [stage], lanes=32, window_chunks=32, seed=1234)
    assert sequences_of(size, 512) == 6730
    plain = order.locate(np.arange(6730))
    assert len(set(pairs(plain, plain.epoch >= 0))) < 6730
    (_, closing) = end_with_epoch(order, [size], 1, 0)
    found = order.with_stages([stage, closing]).locate(np.arange(6730))
    assert len(set(pairs(found, found.epoch == 0))) == closing.end_sample == 6730
    assert closing.end_sample - closing.first_sample < 32 * 16, "the last part is less than a chunk per lane"
    kept = order.locate(np.arange(closing.first_sample))
    assert all((a[: len(b)] == b).all() for a, b in zip(found, kept, strict=True)), (
        "what comes before is as ever"
    )


def test_the_sources_of_a_mixture_end_together() -> None:
    all_sizes = [SourceSize(2000, 64, 64), SourceSize(300, 64, 8), SourceSize(40, 64, 64)]
    weights = tuple(float(sequences_of(size, 4)) for size in all_sizes)
    stages = [DataStage(weights=weights, sequence_length=4, batch_sequences=8)]
    order = Order(all_sizes, stages, lanes=2, window_chunks=8, seed=0)
    ended = end_with_epoch(order, all_sizes, 1, 0)
    total = sum(sequences_of(size, 4) for size in all_sizes)
    assert ended[-1].end_sample == total
    assert total - ended[-1].first_sample < total / 50
    source = order.with_stages(ended).locate(np.arange(total)).source
    for first in range(0, total // 2, total // 10):
        share = np.bincount(source[first : first + total // 10], minlength=3) / (total // 10)
        assert share == pytest.approx(np.array(weights) / sum(weights), abs=0.01)


def test_the_end_of_an_epoch_may_not_lie_behind_or_before_a_stage() -> None:
    size = SourceSize(10, 16, 16)
    order = make(size, lanes=2)
    with pytest.raises(ConfigError, match=r"total_epochs=1 is less than the run has already read"):
        end_with_epoch(order, [size], 1, 41)
    late = replace(order.stages[0], first_sample=45, start_tokens=180, sequence_length=8)
    with pytest.raises(
        ConfigError, match=r"start_tokens=180 is too late: with total_epochs=1.* after 160 tokens"
    ):
        end_with_epoch(order.with_stages([order.stages[0], late]), [size], 1, 0)


def test_epochs_are_counted_in_tokens() -> None:
    both = [SourceSize(40, 16, 16), SourceSize(10, 16, 16)]
    stages = as_stages([(0, [0.5, 0.5])])
    stages.append(DataStage(first_sample=320, weights=(0.5, 0.5), sequence_length=8, batch_sequences=1))
    order = Order(both, stages, lanes=4, window_chunks=2, seed=0)
    assert order.epochs(320) == pytest.approx([1.0, 4.0], abs=0.05)
    # Half of 160 samples, of 8 tokens each, are one epoch of 640 tokens, or four of 160.
    assert order.epochs(480) == pytest.approx([2.0, 8.0], abs=0.1)
