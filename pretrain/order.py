"""The order of training samples: global sample index -> (source, epoch, chunk, sequence).

A pure function of the sources' sizes, the seed and the mixture schedule. It reads no file, knows nothing
of ranks, and answers for any index at once, so that a run resumes anywhere, on any number of ranks, and
"what was read at step n" has an answer without a log. Names: V lanes, T tokens per sequence; for one
source N chunks per epoch, C sequences in a full chunk, C_last in the corpus's last chunk.

**1. Lanes.** Sample i is on lane v = i mod V, at position p = i div V of that lane. Lanes are virtual: V is
fixed for a run while the number of ranks is not (`rank_samples` says which samples a rank reads).

**2. Mixture.** The weights become integer quotas q_k over a period of P = 2^16 positions. The j-th of source
k's q_k places is wanted at (j + 1/2) / q_k of the period; sorting all places by that interleaves the sources
evenly. Every lane repeats this pattern, rotated by an amount of its own, so that the lanes, and with them
every batch, hold different sources at any time. How many samples of source k precede a position of a lane,
    n = (whole periods) q_k + (places of k before this one in the period) + base[v, k],
is a table look-up. Over a period the shares are exact, and since the pattern repeats nothing drifts: on a
lane a count is never further than the number of sources from its quota. A stage, with other weights, begins
at a multiple of V, starts the pattern anew, and has the counts of all earlier stages in its `base`, so that no
source loses or repeats a sample.

**3. Chunks to lanes.** A source's epochs are concatenated to one stream of chunks, g = e N + ordinal, and
dealt round robin: lane g mod V, row g div V. Each chunk thus belongs to one lane per epoch, and lanes that
have drawn the same number n of samples are in the same row or in adjacent ones: no lane runs into later
epochs than the others.

The last chunk may be short by d = C - C_last sequences. If it fell on the same lane in each epoch (as it
would where V divides N), that lane would run ahead. So in epoch e it gets the ordinal
    s(e) = (e div (V/G)) mod G,    G = gcd(V, N) <= N,
and over V epochs (N rows) each lane has it exactly once: as e runs over V/G consecutive epochs, e N mod V
runs over all multiples of G, and s(e) in 0..G-1 over the blocks of V/G epochs fills what lies between. On lane
v = a G + b it comes in the epochs with s(e) = b and e N = a G (mod V), that is (mod V)
    e = b (V/G) + (a (N/G)^-1 mod V/G),
and therefore in row k0 = (e N + b - v) / V, and in every N-th row from there. In closed form
    samples_before(row) = row C - d ceil((row - k0) / N)
    row_of(n) = q N + (r div C if r < k0 C + C_last else (r + d) div C),   q, r = divmod(n, N C - d).

**4. Shuffling.** The ordinals of an epoch are a permutation of its chunks, and the sequences of W successive
rows of a lane (a window, which never crosses an epoch) are permuted. Both are Feistel networks with cycle
walking: a bijection of any size, evaluated at one point, without a table. So a lane has W chunks in use
at a time, known ahead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pretrain.config import ConfigError

PERIOD = 1 << 16
"""P: positions of a lane after which the mixture pattern repeats; weights are exact to 1 / P."""
MIN_ROWS = 16
"""`choose_lanes` gives each lane at least this many chunks per epoch."""
STATE_SCHEMA = 1
_ROTATION = 40503  # P / golden ratio, odd: successive lanes start at evenly spread, all different places
_FEISTEL_ROUNDS = 6  # 4 are enough for large sizes; windows of five to eight sequences want more
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_CHUNKS, _SEQUENCES = 0, 1  # what a permutation is for; part of its key

Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]


@dataclass(frozen=True)
class SourceSize:
    """What the order needs to know of a corpus."""

    n_chunks: int
    chunk_tokens: int
    """Tokens of every chunk but the last."""
    last_chunk_tokens: int

    def sequences_per_chunk(self, sequence_length: int) -> tuple[int, int]:
        """C and C_last: sequences of a full chunk, and of the last one (its last sequence may be part padding)."""
        return self.chunk_tokens // sequence_length, -(-self.last_chunk_tokens // sequence_length)


class Location(NamedTuple):
    """Where samples lie; int64 arrays of equal length."""

    source: Ints
    epoch: Ints
    chunk: Ints
    """Number of the chunk within its corpus."""
    sequence: Ints
    """Number of the sequence within its chunk: its first token is sequence x T."""


class Order:
    """The order of all samples of a run.

    `stages` are pairs of the first global sample index, a multiple of `lanes`, and one weight per source; the
    first begins at 0. Tables take about (0.4 MB + 8 B x lanes x sources) per stage.
    """

    def __init__(
        self,
        sizes: list[SourceSize],
        stages: list[tuple[int, list[float]]],
        *,
        sequence_length: int,
        lanes: int,
        window_chunks: int,
        seed: int,
    ) -> None:
        self._arguments = (sizes, stages, sequence_length, lanes, window_chunks, seed)
        starts = [start for start, _ in stages]
        if starts[0] != 0 or sorted(starts) != starts or any(start % lanes for start in starts):
            raise ValueError(f"stages begin at {starts}, not at increasing multiples of {lanes} from 0")
        self.lanes, self.window_chunks, self.seed = lanes, window_chunks, seed
        per_chunk = [size.sequences_per_chunk(sequence_length) for size in sizes]
        common = [math.gcd(lanes, size.n_chunks) for size in sizes]
        self._n_chunks = np.array([size.n_chunks for size in sizes], np.int64)
        self._per_chunk = np.array([full for full, _ in per_chunk], np.int64)
        self._missing = np.array([full - last for full, last in per_chunk], np.int64)
        self._common = np.array(common, np.int64)
        self._inverse = np.array(
            [pow(size.n_chunks // g, -1, lanes // g) for size, g in zip(sizes, common, strict=True)], np.int64
        )
        self._build_stages(starts, [quotas(weights) for _, weights in stages])

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to another process as its arguments: see `Corpus.__reduce__`."""
        return _order_of, self._arguments

    def _build_stages(self, starts: list[int], stage_quotas: list[list[int]]) -> None:
        """Tables of all stages: the pattern [S, P], each place's rank [S, P], base counts [S, V, K], quotas [S, K]."""
        self._first_position = np.array(starts, np.int64) // self.lanes
        self._quotas = np.array(stage_quotas, np.int64)
        n_stages, n_sources = self._quotas.shape
        self._rotation = np.arange(self.lanes, dtype=np.int64) * _ROTATION % PERIOD
        self._pattern = np.empty((n_stages, PERIOD), np.uint16)
        self._rank = np.empty((n_stages, PERIOD), np.int32)
        self._base = np.empty((n_stages, self.lanes, n_sources), np.int64)
        drawn = np.zeros((self.lanes, n_sources), np.int64)  # by all earlier stages
        for s in range(n_stages):
            self._pattern[s] = _interleave(self._quotas[s])
            places = [np.flatnonzero(self._pattern[s] == k) for k in range(n_sources)]
            for mine in places:
                self._rank[s, mine] = np.arange(len(mine))
            skipped = _places_before(places, self._rotation)
            self._base[s] = drawn - skipped
            if s + 1 < n_stages:
                end = self._rotation + self._first_position[s + 1] - self._first_position[s]
                drawn += (end // PERIOD)[:, None] * self._quotas[s]
                drawn += _places_before(places, end % PERIOD) - skipped

    def locate(self, samples: Ints) -> Location:
        """Where the samples of the given global indices (any order, 1-D) lie. Exact up to 1e12 and beyond."""
        samples = np.asarray(samples, np.int64)
        lane, position = samples % self.lanes, samples // self.lanes
        source, n = self._draw(lane, position)
        rows = self._lane_rows(source, lane)
        row = rows.row_of(n)
        # The window: up to W rows of the lane, within the epoch's rows [first, end).
        epoch = (row * self.lanes + lane) // rows.n_chunks
        first = -((lane - epoch * rows.n_chunks) // self.lanes)  # ceil((e N - v) / V)
        end = -((lane - (epoch + 1) * rows.n_chunks) // self.lanes)
        window = (row - first) // self.window_chunks
        low = first + window * self.window_chunks
        begin = rows.samples_before(low)
        size = rows.samples_before(np.minimum(low + self.window_chunks, end)) - begin
        n = begin + permute(n - begin, size, _key(self.seed, _SEQUENCES, source, epoch, lane, window))
        row = rows.row_of(n)
        ordinal = row * self.lanes + lane - epoch * rows.n_chunks
        return Location(source, epoch, self._chunk(source, epoch, ordinal), n - rows.samples_before(row))

    def _draw(self, lane: Ints, position: Ints) -> tuple[Ints, Ints]:
        """Source of each sample, and how many samples of that source precede it on its lane."""
        stage = np.searchsorted(self._first_position, position, side="right") - 1
        along = position - self._first_position[stage] + self._rotation[lane]
        turn, place = along // PERIOD, along % PERIOD
        source = self._pattern[stage, place].astype(np.int64)
        n = self._base[stage, lane, source] + turn * self._quotas[stage, source] + self._rank[stage, place]
        return source, n

    def _lane_rows(self, source: Ints, lane: Ints) -> _LaneRows:
        n_chunks, common = self._n_chunks[source], self._common[source]
        a, b = lane // common, lane % common
        epochs = self.lanes // common
        epoch = b * epochs + a * self._inverse[source] % epochs
        short_row = (epoch * n_chunks + b - lane) // self.lanes
        return _LaneRows(n_chunks, self._per_chunk[source], self._missing[source], short_row)

    def _chunk(self, source: Ints, epoch: Ints, ordinal: Ints) -> Ints:
        """The chunk that has this ordinal in this epoch. A short last chunk has its fixed place, s(e)."""
        common, last = self._common[source], self._n_chunks[source] - 1
        is_short = self._missing[source] > 0
        place = epoch // (self.lanes // common) % common
        rest = ordinal - (is_short & (ordinal > place))
        size = np.maximum(last + 1 - is_short, 1)
        shuffled = permute(np.minimum(rest, size - 1), size, _key(self.seed, _CHUNKS, source, epoch))
        return np.where(is_short & (ordinal == place), last, shuffled)


class _LaneRows(NamedTuple):
    """The rows (chunks) of one source on one lane, for arrays of (source, lane) pairs."""

    n_chunks: Ints
    per_chunk: Ints
    missing: Ints
    """d: sequences that the corpus's last chunk lacks."""
    short_row: Ints
    """k0: first row that holds the last chunk; then every n_chunks-th row."""

    def samples_before(self, row: Ints) -> Ints:
        shorts = (row - self.short_row + self.n_chunks - 1) // self.n_chunks
        return row * self.per_chunk - self.missing * shorts

    def row_of(self, n: Ints) -> Ints:
        per_turn = self.n_chunks * self.per_chunk - self.missing
        turn, rest = n // per_turn, n % per_turn
        after_short = rest >= (self.short_row + 1) * self.per_chunk - self.missing
        return turn * self.n_chunks + (rest + self.missing * after_short) // self.per_chunk


def step_start(sample: int, per_step: int, passed_over: Sequence[Sequence[int]]) -> int:
    """First sample of the step that begins at `sample` or behind what was passed over there."""
    for first, end in sorted((first, end) for first, end in passed_over):
        if sample < end and sample + per_step > first:
            sample = end
    return sample


def quotas(weights: Sequence[float]) -> list[int]:
    """Places of each source in a period: proportional to the weights, at least 1 where a weight is positive."""
    total = math.fsum(weights)  # exactly rounded: the same on every machine
    if not total > 0:
        raise ConfigError(
            f"the mixture's weights {list(weights)} have no positive sum; give at least one source one"
        )
    exact = [weight / total * PERIOD for weight in weights]
    counts = [max(1, math.floor(x)) if x > 0 else 0 for x in exact]
    left = PERIOD - sum(counts)
    for k in sorted(range(len(counts)), key=lambda k: counts[k] - exact[k])[: max(left, 0)]:
        counts[k] += 1
    for _ in range(-left):  # the sources raised to 1 took more than there was
        counts[counts.index(max(counts))] -= 1
    return counts


def _interleave(source_quotas: Ints) -> Ints:
    """The source of each place of the period."""
    wanted = np.concatenate([(np.arange(q) + 0.5) / max(q, 1) for q in source_quotas.tolist()])
    return np.repeat(np.arange(len(source_quotas)), source_quotas)[np.argsort(wanted, kind="stable")]


def _places_before(places: list[Ints], end: Ints) -> Ints:
    """How many of each source's places lie before `end`: [len(end), K]."""
    return np.stack([np.searchsorted(mine, end) for mine in places], axis=1)


def permute(x: Ints, size: Ints, key: Keys) -> Ints:
    """A bijection of [0, size) chosen by `key`, evaluated at `x` (1-D; element by element, 0 <= x < size)."""
    # A balanced Feistel network permutes [0, 2^(2 half)), less than 4 size. Where it leaves [0, size), it is
    # applied again until it comes back (cycle walking), which is a bijection of [0, size).
    bits = np.frexp((size - 1).astype(np.float64))[1]  # bit length
    half = np.maximum((bits + 1) // 2, 1).astype(np.uint64)
    values, limit = x.astype(np.uint64), size.astype(np.uint64)
    key = np.broadcast_to(key, values.shape)
    todo = np.arange(len(values))
    while len(todo):
        shift = half[todo]
        mask = (np.uint64(1) << shift) - np.uint64(1)
        left, right = values[todo] >> shift, values[todo] & mask
        round_key = key[todo]
        for _ in range(_FEISTEL_ROUNDS):
            left, right = right, left ^ (_mix(right + round_key) & mask)
            round_key = round_key + _GOLDEN
        values[todo] = (left << shift) | right
        todo = todo[values[todo] >= limit[todo]]
    return values.astype(np.int64)


def _key(seed: int, *parts: int | Ints) -> Keys:
    """A 64-bit hash of the seed and the parts (1-D arrays, or an integer for all)."""
    key = _mix(np.array([seed % (1 << 64)], np.uint64) + _GOLDEN)
    for part in parts:
        key = _mix((key ^ np.atleast_1d(np.asarray(part, np.int64)).astype(np.uint64)) + _GOLDEN)
    return key


def _mix(x: Keys) -> Keys:
    """Finalizer of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def choose_lanes(sizes: list[SourceSize], global_batch_sequences: int) -> int:
    """V for a new run: the largest divisor of the global batch that leaves each lane enough chunks; at least 1.

    Many lanes are good: a batch then touches many chunks, and with V a multiple of the number of ranks each
    rank reads chunks that no other rank reads. But a lane shuffles its own chunks only, so that it should have
    at least MIN_ROWS of them per epoch of every source. A divisor of the batch gives all lanes the same pace.
    """
    most = min(size.n_chunks for size in sizes) // MIN_ROWS
    return max((v for v in range(1, most + 1) if global_batch_sequences % v == 0), default=1)


def rank_samples(first: int, count: int, *, lanes: int, rank: int, world_size: int) -> Ints:
    """Global indices of the samples [first, first + count) of one batch that belong to `rank`: [count / ranks].

    The batch sorted by (lane, index) is split in equal contiguous parts. If count is a multiple of `lanes` and
    `lanes` of `world_size`, rank r so owns the lanes [r V/R, (r+1) V/R) for the whole run.
    """
    if count % world_size:
        raise ValueError(f"a batch of {count} samples does not split evenly over {world_size} ranks")
    samples = np.arange(first, first + count, dtype=np.int64)
    ordered = samples[np.argsort(samples % lanes, kind="stable")]
    mine = count // world_size
    return ordered[rank * mine : (rank + 1) * mine]


def _order_of(
    sizes: list[SourceSize],
    stages: list[tuple[int, list[float]]],
    sequence_length: int,
    lanes: int,
    window_chunks: int,
    seed: int,
) -> Order:
    return Order(
        sizes, stages, sequence_length=sequence_length, lanes=lanes, window_chunks=window_chunks, seed=seed
    )


@dataclass(kw_only=True, slots=True)
class OrderState:
    """What a checkpoint holds of the data: where the run is in the order, and which order it is.

    The same on every rank. `consumed_samples` counts samples of completed optimizer steps only.
    """

    schema: int = STATE_SCHEMA
    manifest_sha: list[str]
    """Root hash of each source's manifest, in the order of the sources."""
    seed: int
    stages: list[tuple[int, list[float]]]
    """First global sample index, and one weight per source."""
    consumed_samples: int
    lanes: int
    chunk_tokens: list[int]
    """Per source."""
    window_chunks: int
    sequence_length: int
    passed_over: list[list[int]] = field(default_factory=list)
    """Sample indices [first, end) that rollbacks left out of the run, in the order of the rollbacks."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"stages": [[start, list(weights)] for start, weights in self.stages]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OrderState:
        """The inverse of `to_dict`. ConfigError where another version of this program wrote the values."""
        names = {f.name for f in fields(cls)}
        if values.get("schema") != STATE_SCHEMA or set(values) | {"passed_over"} != names:
            raise ConfigError(
                f"the checkpoint's order of samples has schema {values.get('schema')} with the keys {sorted(values)}, "
                f"this version reads schema {STATE_SCHEMA} with {sorted(names)}; resume with the version that wrote it"
            )
        stages = [(start, list(weights)) for start, weights in values["stages"]]
        return cls(**(values | {"stages": stages}))

    def check_compatible(self, other: OrderState) -> None:
        """Raise ConfigError unless the configured order, `other`, goes on as this saved one began.

        What is still unread may change: stages from `consumed_samples` on, and sources appended to the list
        (they have no weight in what was read).
        """
        differences = [
            f"{key}={new} was {old}"
            for key, old, new in [
                ("seed", self.seed, other.seed),
                ("data.sequence_length", self.sequence_length, other.sequence_length),
                ("data.lanes", self.lanes, other.lanes),
                ("data.window_chunks", self.window_chunks, other.window_chunks),
            ]
            if old != new
        ]
        differences += self._corpus_differences(other)
        old_stages, new_stages = (_begun(state, self.consumed_samples) for state in (self, other))
        if old_stages != new_stages:
            differences.append(
                f"the mixture of the {self.consumed_samples} samples already read, as (first sample, weights), "
                f"{_begun_text(other, self.consumed_samples)} was {_begun_text(self, self.consumed_samples)}"
            )
        if differences:
            raise ConfigError(
                f"the run cannot go on with this order of samples: {'; '.join(differences)}. "
                "Restore what it began with, or start a new run_dir (init_from=RUN_DIR keeps the weights)"
            )

    def _corpus_differences(self, other: OrderState) -> list[str]:
        if len(other.manifest_sha) < len(self.manifest_sha):
            return [
                f"the corpus changed: {len(other.manifest_sha)} sources, was {len(self.manifest_sha)} "
                "(a source leaves by weight 0, not by its removal)"
            ]
        return [
            f"the corpus changed: source {k} has root hash {new}, was {old}"
            for k, (old, new) in enumerate(zip(self.manifest_sha, other.manifest_sha, strict=False))
            if old != new
        ] + [
            f"the corpus changed: source {k} has chunks of {new} tokens, was {old}"
            for k, (old, new) in enumerate(zip(self.chunk_tokens, other.chunk_tokens, strict=False))
            if old != new
        ]


def _begun(state: OrderState, consumed: int) -> list[tuple[int, list[int]]]:
    """The stages of which something was read, with trailing sources of quota 0 left out: what fixes the past."""
    begun = []
    for start, weights in state.stages:
        if start < consumed:
            counts = quotas(weights)
            while counts[-1] == 0:
                counts.pop()
            begun.append((start, counts))
    return begun


def _begun_text(state: OrderState, consumed: int) -> str:
    return str([(start, list(weights)) for start, weights in state.stages if start < consumed])
