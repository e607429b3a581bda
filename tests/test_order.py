"""The order of samples: every sequence once per epoch, on any number of ranks, whatever the mixture does."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import ConfigError
from pretrain.order import (
    PERIOD,
    Location,
    Order,
    OrderState,
    SourceSize,
    choose_lanes,
    permute,
    quotas,
    rank_samples,
)

LANES = st.integers(1, 12)
SEEDS = st.integers(-(2**63), 2**63 - 1)


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
        stages or [(0, [1.0] * len(all_sizes))],
        sequence_length=4,
        lanes=lanes,
        window_chunks=window_chunks,
        seed=seed,
    )


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
    for field, values in together._asdict().items():
        alone = [int(getattr(again.locate(samples[i : i + 1]), field)[0]) for i in range(len(samples))]
        assert values.tolist() == alone


def test_indices_far_beyond_any_run() -> None:
    """1e12 samples of a corpus of 57 million chunks: no overflow, everything within its bounds."""
    size = SourceSize(57_000_000, 2**18, 1234)
    order = Order([size], [(0, [1.0])], sequence_length=2048, lanes=1536, window_chunks=32, seed=7)
    samples = np.random.default_rng(0).integers(0, 10**12, 2000)
    found = order.locate(samples)
    per_epoch = (size.n_chunks - 1) * 128 + 1
    assert ((found.chunk >= 0) & (found.chunk < size.n_chunks)).all()
    assert ((found.sequence >= 0) & (found.sequence < 128)).all()
    assert (np.abs(found.epoch - samples / per_epoch) < 1.001).all()


def test_the_order_is_what_it_was() -> None:
    """Existing runs resume by this function: another result is another order, and needs a new schema number."""
    both = [SourceSize(101, 4096, 1000), SourceSize(40, 4096, 4096)]
    order = Order(
        both, [(0, [0.7, 0.3]), (1600, [0.2, 0.8])], sequence_length=512, lanes=8, window_chunks=5, seed=42
    )
    found = np.stack(order.locate(np.arange(20_000))).astype("<i8")
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


@pytest.mark.parametrize("starts", [[4], [0, 6], [0, 8, 4]])
def test_stages_begin_at_whole_rows(starts: list[int]) -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        make(SourceSize(5, 16, 16), [(start, [1.0]) for start in starts], lanes=4)


# --- permutations ---


@given(ns=st.lists(st.integers(1, 70), min_size=1, max_size=8), seed=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection_of_any_size(ns: list[int], seed: int) -> None:
    x = np.concatenate([np.arange(n) for n in ns])
    keys = np.repeat(np.array([(seed + j) % 2**64 for j in range(len(ns))], np.uint64), ns)
    y = permute(x, np.repeat(ns, ns), keys)
    for part, n in zip(np.split(y, np.cumsum(ns)[:-1]), ns, strict=True):
        assert sorted(part.tolist()) == list(range(n))


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


# --- state ---

STATE = OrderState(
    manifest_sha=["a" * 64, "b" * 64],
    seed=1,
    stages=[(0, [0.5, 0.5]), (800, [0.9, 0.1]), (1600, [0.1, 0.9])],
    consumed_samples=1000,
    lanes=8,
    chunk_tokens=[4096, 4096],
    window_chunks=32,
    sequence_length=512,
)


def test_state_survives_json_and_is_small() -> None:
    text = json.dumps(STATE.to_dict())
    assert OrderState.from_dict(json.loads(text)) == STATE
    assert len(text) < 500
    single = replace(STATE, manifest_sha=["a" * 64], stages=[(0, [1.0])], chunk_tokens=[4096])
    assert len(json.dumps(single.to_dict())) < 280


def test_state_of_another_version_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"schema 99.*reads schema 1"):
        OrderState.from_dict(STATE.to_dict() | {"schema": 99})
    values = STATE.to_dict()
    del values["lanes"]
    with pytest.raises(ConfigError, match="resume with the version that wrote it"):
        OrderState.from_dict(values)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": 2}, "seed=2 was 1"),
        ({"sequence_length": 1024}, "data.sequence_length=1024 was 512"),
        ({"lanes": 16}, "data.lanes=16 was 8"),
        ({"window_chunks": 4}, "data.window_chunks=4 was 32"),
        (
            {"manifest_sha": ["a" * 64, "c" * 64]},
            f"the corpus changed: source 1 has root hash {'c' * 64}, was {'b' * 64}",
        ),
        ({"manifest_sha": ["a" * 64]}, "the corpus changed: 1 sources, was 2"),
        ({"chunk_tokens": [4096, 8192]}, "the corpus changed: source 1 has chunks of 8192 tokens, was 4096"),
        ({"stages": [(0, [0.5, 0.5])]}, r"1000 samples already read.*\(800, \[0.9, 0.1\]\)"),
        ({"stages": [(0, [0.5, 0.5]), (808, [0.9, 0.1])]}, r"\(808, .* was .*\(800, "),
        ({"stages": [(0, [0.4, 0.6]), (800, [0.9, 0.1])]}, r"\[0.4, 0.6\].* was .*\[0.5, 0.5\]"),
    ],
)
def test_another_order_is_refused_by_name(change: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as refusal:
        STATE.check_compatible(replace(STATE, **change))
    assert str(refusal.value).count(" was ") == 1, "only what differs is named"


def test_every_difference_is_named() -> None:
    with pytest.raises(ConfigError, match=r"seed=2 was 1; data\.lanes=16 was 8"):
        STATE.check_compatible(replace(STATE, seed=2, lanes=16))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"consumed_samples": 0},
        {"stages": STATE.stages[:2]},  # a stage to come is dropped
        {"stages": [*STATE.stages[:2], (1000, [0.2, 0.8]), (9000, [1.0, 0.0])]},  # or others come
        {"stages": [(0, [1.0, 1.0]), (800, [9.0, 1.0])]},  # the same mixture in other numbers
        {  # a new source joins
            "manifest_sha": [*STATE.manifest_sha, "c" * 64],
            "chunk_tokens": [4096] * 3,
            "stages": [(0, [0.5, 0.5, 0.0]), (800, [0.9, 0.1, 0.0]), (1200, [0.4, 0.3, 0.3])],
        },
    ],
)
def test_what_is_still_unread_may_change(change: dict) -> None:
    STATE.check_compatible(replace(STATE, **change))
    _, begun = replace(STATE, **change).stages[:2]
    assert quotas(begun[1])[:2] == quotas([0.9, 0.1])


def test_a_source_that_joins_leaves_the_past_as_it_was() -> None:
    old = [SourceSize(50, 16, 7), SourceSize(20, 16, 16)]
    new = [*old, SourceSize(30, 16, 3)]
    before = make(old, [(0, [0.5, 0.5])]).locate(np.arange(1200))
    after = make(new, [(0, [0.5, 0.5, 0.0]), (1200, [0.4, 0.3, 0.3])]).locate(np.arange(2400))
    assert all((a == b[:1200]).all() for a, b in zip(before, after, strict=True))
    assert (after.source[1200:] == 2).any()
