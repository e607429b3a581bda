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
    n = begin[v, k] + (whole periods) q_k + (places of k before this one in the period) - (those before the rotation),
is a table look-up. Over a period the shares are exact, and since the pattern repeats nothing drifts: on a
lane a count is never further than the number of sources from its quota. A stage, with other weights, begins
at any sample, starts the pattern anew, and has the counts of all earlier stages in its `begin`, so that no
source loses or repeats a sample.

A stage may have longer sequences, T' = m T. Then what each lane has left of the window (see 4) that it is reading
from a source comes first, m of the short sequences, as they are permuted, to each long one (the last may be
padded); from the next window on it reads sequences of T'. So here too no token is lost or read twice.

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pretrain.config.data_stages import Stage, stage_at
from pretrain.data.mixture import PERIOD, interleave, quotas
from pretrain.data.permutation import Ints, key_of, permute, unpermute

_ROTATION = 40503  # P / golden ratio, odd: successive lanes start at evenly spread, all different places
_CHUNKS, _SEQUENCES = 0, 1  # what a permutation is for; part of its key


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
    """Where samples lie, as pieces, one per sample but where the sequence length has just grown; int64 arrays."""

    source: Ints
    epoch: Ints
    chunk: Ints
    """Number of the chunk within its corpus."""
    sequence: Ints
    """Number of the sequence within its chunk: its first token is sequence x length."""
    length: Ints
    """Tokens of the piece, where its chunk has so many."""
    row: Ints
    """Which of the asked samples the piece belongs to; ascending."""


class Found(NamedTuple):
    """Samples that hold something of one chunk; int64 arrays."""

    sample: Ints
    sequence: Ints
    epoch: Ints
    length: Ints


class Order:
    """The order of all samples of a run.

    The first stage begins at 0. Tables take about (0.4 MB + 40 B x lanes x sources) per stage.
    """

    def __init__(
        self,
        sizes: Sequence[SourceSize],
        stages: Sequence[Stage],
        *,
        lanes: int,
        window_chunks: int,
        seed: int,
    ) -> None:
        self._arguments = (sizes, stages, lanes, window_chunks, seed)
        starts = [stage.first_sample for stage in stages]
        if starts[0] != 0 or sorted(starts) != starts:
            raise ValueError(f"stages begin at {starts}, not at increasing samples from 0")
        self.stages, self.lanes, self.window_chunks, self.seed = list(stages), lanes, window_chunks, seed
        self._parts = _distinct(stages)
        self._lengths = sorted({stage.sequence_length for stage in stages})
        per_chunk = [[size.sequences_per_chunk(length) for size in sizes] for length in self._lengths]
        common = [math.gcd(lanes, size.n_chunks) for size in sizes]
        self._n_chunks = np.array([size.n_chunks for size in sizes], np.int64)
        self._per_chunk = np.array([[full for full, _ in row] for row in per_chunk], np.int64)  # [lengths, K]
        self._missing = np.array([[full - last for full, last in row] for row in per_chunk], np.int64)
        self._common = np.array(common, np.int64)
        self._inverse = np.array(
            [pow(size.n_chunks // g, -1, lanes // g) for size, g in zip(sizes, common, strict=True)], np.int64
        )
        self._build_stages()

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to another process as its arguments: see `Corpus.__reduce__`."""
        return _order_of, self._arguments

    def with_stages(self, stages: Sequence[Stage]) -> Order:
        """The same with other stages."""
        sizes, _, *rest = self._arguments
        return _order_of(sizes, stages, *rest)

    def _build_stages(self) -> None:
        """Tables of all stages: the pattern [S, P], each place's rank [S, P], quotas [S, K], and where a lane is."""
        self._first_sample = np.array([stage.first_sample for stage in self._parts], np.int64)
        self._length = np.array([self._lengths.index(s.sequence_length) for s in self._parts], np.int64)
        self._quotas = np.array([quotas(stage.drawn_weights) for stage in self._parts], np.int64)
        n_stages, n_sources = self._quotas.shape
        lane = np.arange(self.lanes, dtype=np.int64)
        self._rotation = lane * _ROTATION % PERIOD
        # The first position of each lane in each stage, [S, V].
        self._first_position = -((lane - self._first_sample[:, None]) // self.lanes)
        self._pattern = np.empty((n_stages, PERIOD), np.uint16)
        self._rank = np.empty((n_stages, PERIOD), np.int32)
        self._skipped = np.empty(
            (n_stages, self.lanes, n_sources), np.int64
        )  # places that the rotation leaves out
        self._begin: list[_Begin] = []
        begin = _Begin(*np.zeros((4, self.lanes, n_sources), np.int64))
        for s in range(n_stages):
            self._pattern[s] = interleave(self._quotas[s])
            for k in range(n_sources):
                mine = np.flatnonzero(self._pattern[s] == k)
                self._rank[s, mine] = np.arange(len(mine))
            self._skipped[s] = self._places_before(s, self._rotation)
            self._begin.append(begin)
            if s + 1 < n_stages:
                begin = self._next_begin(s)
        self._starts = _Begin(*(np.stack(tables) for tables in zip(*self._begin, strict=True)))  # [S, V, K]

    def _places_before(self, stage: int, end: Ints) -> Ints:
        """How many of each source's places of the period lie before `end`: [len(end), K]."""
        places = [np.flatnonzero(self._pattern[stage] == k) for k in range(self._quotas.shape[1])]
        return np.stack([np.searchsorted(mine, end) for mine in places], axis=1)

    def _drawn(self, stage: int, sample: int) -> Ints:
        """Samples that each lane has drawn of each source from the stage's beginning up to `sample`: [V, K]."""
        position = -((np.arange(self.lanes) - sample) // self.lanes)
        end = self._rotation + position - self._first_position[stage]
        drawn = (end // PERIOD)[:, None] * self._quotas[stage] + self._places_before(stage, end % PERIOD)
        return drawn - self._skipped[stage]

    def _next_begin(self, stage: int) -> _Begin:
        """Where each lane goes on in each source when the next stage begins."""
        begin = self._begin[stage]
        drawn = self._drawn(stage, int(self._first_sample[stage + 1]))
        per = self._pieces_per_sample(stage, begin.rest_length)
        rest = np.maximum(0, begin.rest - drawn * per)
        first = begin.rest_first + begin.rest - rest
        n = begin.n + np.maximum(0, drawn + -begin.rest // per)
        if self._length[stage + 1] == self._length[stage]:
            return _Begin(n, first, rest, begin.rest_length)
        # Longer sequences from here on. The window that is half read is read to its end in its short pieces.
        source, lane = np.broadcast_arrays(np.arange(n.shape[1]), np.arange(self.lanes)[:, None])
        rows = self._lane_rows(self._length[stage], source, lane)
        _, low, high = self._window(rows, lane, rows.row_of(n))
        fresh = rows.samples_before(low) == n
        row = np.where(fresh, low, high)
        own = np.where(fresh, 0, rows.samples_before(high) - n)
        after = self._lane_rows(self._length[stage + 1], source, lane).samples_before(row)
        in_rest = rest > 0  # of a still shorter length: then nothing of the window after it has been read
        return _Begin(
            after,
            np.where(in_rest, first, n),
            np.where(in_rest, rest, own),
            np.where(in_rest, begin.rest_length, self._length[stage]),
        )

    def _pieces_per_sample(self, stage: int | Ints, rest_length: Ints) -> Ints:
        lengths = np.array(self._lengths, np.int64)
        return lengths[self._length[stage]] // lengths[rest_length]

    def locate(self, samples: Ints) -> Location:
        """Where the samples of the given global indices (any order, 1-D) lie. Exact up to 1e12 and beyond."""
        samples = np.asarray(samples, np.int64)
        row = np.arange(len(samples))
        lane, position = samples % self.lanes, samples // self.lanes
        stage = np.searchsorted(self._first_sample, samples, side="right") - 1
        source, drawn = self._draw(stage, lane, position)
        begin = _Begin(*(table[stage, lane, source] for table in self._starts))
        length = self._length[stage]
        if not begin.rest.any():
            return self._place(row, length, source, lane, begin.n + drawn)
        per = self._pieces_per_sample(stage, begin.rest_length)
        taken = drawn * per
        in_rest = taken < begin.rest
        n_pieces = np.where(in_rest, np.minimum(per, begin.rest - taken), 1)
        n = np.where(in_rest, begin.rest_first + taken, begin.n + drawn + -begin.rest // per)
        row = np.repeat(row, n_pieces)
        within = np.arange(len(row)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)
        length = np.where(in_rest, begin.rest_length, length)[row]
        return self._place(row, length, source[row], lane[row], n[row] + within)

    def _place(self, row: Ints, length: Ints, source: Ints, lane: Ints, n: Ints) -> Location:
        """The n-th sequence of so many tokens (an index of `_lengths`) of a source on a lane."""
        rows = self._lane_rows(length, source, lane)
        epoch, low, high = self._window(rows, lane, rows.row_of(n))
        begin = rows.samples_before(low)
        size = rows.samples_before(high) - begin
        window = (low - self._first_row(rows, lane, epoch)) // self.window_chunks
        n = begin + permute(n - begin, size, key_of(self.seed, _SEQUENCES, source, epoch, lane, window))
        place = rows.row_of(n)
        ordinal = place * self.lanes + lane - epoch * rows.n_chunks
        chunk = self._chunk(source, epoch, ordinal)
        tokens = np.array(self._lengths, np.int64)[length]
        return Location(source, epoch, chunk, n - rows.samples_before(place), tokens, row)

    def _first_row(self, rows: _LaneRows, lane: Ints, epoch: Ints) -> Ints:
        return -((lane - epoch * rows.n_chunks) // self.lanes)  # ceil((e N - v) / V)

    def _window(self, rows: _LaneRows, lane: Ints, row: Ints) -> tuple[Ints, Ints, Ints]:
        """Epoch of a row, and its window: up to W rows [low, high) of the lane, within the epoch's rows."""
        epoch = (row * self.lanes + lane) // rows.n_chunks
        first = self._first_row(rows, lane, epoch)
        low = first + (row - first) // self.window_chunks * self.window_chunks
        return epoch, low, np.minimum(low + self.window_chunks, self._first_row(rows, lane, epoch + 1))

    def _draw(self, stage: Ints, lane: Ints, position: Ints) -> tuple[Ints, Ints]:
        """Source of each sample, and how many samples of that source the lane drew before it in its stage."""
        along = position - self._first_position[stage, lane] + self._rotation[lane]
        turn, place = along // PERIOD, along % PERIOD
        source = self._pattern[stage, place].astype(np.int64)
        n = turn * self._quotas[stage, source] + self._rank[stage, place]
        return source, n - self._skipped[stage, lane, source]

    def _lane_rows(self, length: Ints, source: Ints, lane: Ints) -> _LaneRows:
        n_chunks, common = self._n_chunks[source], self._common[source]
        a, b = lane // common, lane % common
        epochs = self.lanes // common
        epoch = b * epochs + a * self._inverse[source] % epochs
        short_row = (epoch * n_chunks + b - lane) // self.lanes
        return _LaneRows(n_chunks, self._per_chunk[length, source], self._missing[length, source], short_row)

    def _chunk(self, source: Ints, epoch: Ints, ordinal: Ints) -> Ints:
        """The chunk that has this ordinal in this epoch. A short last chunk has its fixed place, s(e)."""
        # By the first stage's length, or the order would change where longer sequences make up for what is missing.
        is_short = self._missing[0, source] > 0
        common, last = self._common[source], self._n_chunks[source] - 1
        place = epoch // (self.lanes // common) % common
        rest = ordinal - (is_short & (ordinal > place))
        size = np.maximum(last + 1 - is_short, 1)
        shuffled = permute(np.minimum(rest, size - 1), size, key_of(self.seed, _CHUNKS, source, epoch))
        return np.where(is_short & (ordinal == place), last, shuffled)

    def find(self, source: int, chunk: int, end_sample: int) -> Found:
        """All samples before `end_sample` that hold something of a chunk: the inverse of `locate`."""
        begun = math.ceil(self.chunks_read(end_sample)[:, source].max())  # by the lane that is furthest
        n_epochs = math.ceil(begun * self.lanes / self._n_chunks[source])
        parts = []
        for epoch in range(n_epochs + 1):
            place = epoch * self._n_chunks[source] + self._ordinal(source, epoch, chunk)
            lane, row = int(place % self.lanes), int(place // self.lanes)
            for length in range(len(self._lengths)):
                n, sequence = self._drawn_as(length, source, lane, row, epoch)
                parts += [
                    (
                        sample,
                        sequence[which],
                        np.full_like(sample, epoch),
                        np.full_like(sample, self._lengths[length]),
                    )
                    for sample, which in self._samples_of(length, source, lane, n)
                ]
        found = (
            [np.concatenate(column) for column in zip(*parts, strict=True)]
            if parts
            else [np.empty(0, np.int64)] * 4
        )
        kept = found[0] < end_sample
        ascending = np.argsort(found[0][kept], kind="stable")
        return Found(*(column[kept][ascending] for column in found))

    def _ordinal(self, source: int, epoch: int, chunk: int) -> int:
        """The inverse of `_chunk`."""
        common, last = self._common[source], int(self._n_chunks[source]) - 1
        is_short = self._missing[0, source] > 0
        place = int(epoch // (self.lanes // common) % common)
        if is_short and chunk == last:
            return place
        size = np.array([last + 1 - is_short])
        [rest] = unpermute(np.array([chunk]), size, key_of(self.seed, _CHUNKS, source, epoch)).tolist()
        return rest + (is_short and rest >= place)

    def _drawn_as(self, length: int, source: int, lane: int, row: int, epoch: int) -> tuple[Ints, Ints]:
        """When a lane draws the sequences of a row, as the n-th of the source; and which sequence each is."""
        at = np.array([source]), np.array([lane])
        rows = self._lane_rows(np.array([length]), *at)
        _, low, high = self._window(rows, at[1], np.array([row]))
        begin = rows.samples_before(low)
        size = rows.samples_before(high) - begin
        window = (low - self._first_row(rows, at[1], np.array([epoch]))) // self.window_chunks
        first, end = (int(rows.samples_before(np.array([r]))[0]) for r in (row, row + 1))
        placed = np.arange(first, end)
        key = key_of(self.seed, _SEQUENCES, source, epoch, lane, window)
        return begin + unpermute(placed - begin, np.broadcast_to(size, placed.shape), key), placed - first

    def _samples_of(self, length: int, source: int, lane: int, n: Ints) -> Iterator[tuple[Ints, Ints]]:
        """The samples that are the n-th sequences of a length from a source on a lane; and which of `n` they are."""
        for s, quota in enumerate(self._quotas[:, source].tolist()):
            begin = _Begin(*(table[s, lane, source] for table in self._starts))
            per = self._pieces_per_sample(s, begin.rest_length)
            is_own = (n >= begin.n) & (length == self._length[s])
            in_rest = (n >= begin.rest_first) & (n < begin.rest_first + begin.rest)
            for drawn, mask in (
                (n - begin.n - -begin.rest // per, is_own),
                ((n - begin.rest_first) // per, in_rest & (length == begin.rest_length)),
            ):
                if s + 1 < len(self._parts):
                    mask &= drawn < self._drawn(s, self._parts[s + 1].first_sample)[lane, source]
                which = np.flatnonzero(mask & (quota > 0))
                if len(which):
                    yield self._sample(s, source, lane, drawn[which]), which

    def _sample(self, stage: int, source: int, lane: int, drawn: Ints) -> Ints:
        """The inverse of `_draw`."""
        turn, rank = np.divmod(drawn + self._skipped[stage, lane, source], self._quotas[stage, source])
        place = np.flatnonzero(self._pattern[stage] == source)[rank]
        position = turn * PERIOD + place - self._rotation[lane] + self._first_position[stage, lane]
        return position * self.lanes + lane

    def chunks_read(self, sample: int) -> NDArray[np.float64]:
        """Chunks of each source that each lane has read before `sample`, in parts of one: [V, K]."""
        stage = stage_at(self._parts, sample)
        begin, drawn = self._begin[stage], self._drawn(stage, sample)
        per = self._pieces_per_sample(stage, begin.rest_length)
        n = begin.n + np.maximum(0, drawn + -begin.rest // per)
        source, lane = np.broadcast_arrays(np.arange(n.shape[1]), np.arange(self.lanes)[:, None])
        rows = self._lane_rows(self._length[stage], source, lane)
        row = rows.row_of(n)
        within = (n - rows.samples_before(row)) / rows.per_chunk
        rest = np.maximum(0, begin.rest - drawn * per) / self._per_chunk[begin.rest_length, source]
        return row + within - rest

    def epochs(self, sample: int) -> list[float]:
        """How often each source has been read before `sample`, in chunks: a short last one counts as one."""
        return (self.chunks_read(sample).sum(axis=0) / self._n_chunks).tolist()

    def is_read(self, source: int, n_epochs: int, sample: int) -> bool:
        """Whether any lane draws from the source beyond so many epochs before `sample`."""
        lane = np.arange(self.lanes)
        end = -((lane - n_epochs * self._n_chunks[source]) // self.lanes)
        return bool((self.chunks_read(sample)[:, source] > end).any())


def _distinct(stages: Sequence[Stage]) -> list[Stage]:
    """Without stages that change the batch alone, which has no part in the order."""
    kept = [stages[0]]
    for stage in stages[1:]:
        before = quotas(kept[-1].drawn_weights), kept[-1].sequence_length
        if (quotas(stage.drawn_weights), stage.sequence_length) != before:
            kept.append(stage)
    return kept


class _Begin(NamedTuple):
    """Where lanes go on in sources when a stage begins."""

    n: Ints
    """Sequences of the stage's length before the first one, once the rest is read."""
    rest_first: Ints
    """Of a window that was begun with shorter sequences: the first of those that are left,"""
    rest: Ints
    """their number,"""
    rest_length: Ints
    """and their length, as an index of the order's lengths."""


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


def _order_of(
    sizes: Sequence[SourceSize], stages: Sequence[Stage], lanes: int, window_chunks: int, seed: int
) -> Order:
    return Order(sizes, stages, lanes=lanes, window_chunks=window_chunks, seed=seed)
