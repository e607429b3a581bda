"""The order of training samples: global sample index -> (source, epoch, chunk, sequence).

It is a pure function of the sizes of the sources, the seed and the data stages. It reads no file, does not depend on
ranks, and can be evaluated at any index. So a run resumes at any step, on any number of ranks, and "what was read at
step n" can be answered without a log. Names: V lanes, T tokens per sequence; for one
source N chunks per epoch, C sequences in a full chunk, C_last in the corpus's last chunk.

**Example.** Two sources, w with 8 chunks and c with 4, are mixed 3 to 1. Chunks have 16 tokens and sequences 8, so
that C = 2. There are V = 2 lanes, and windows of W = 2 chunks. `w3.0` is the first sequence of chunk 3 of source w.

>>> sizes = [SourceSize(8, 16, 16), SourceSize(4, 16, 16)]
>>> stage = DataStage(weights=(3.0, 1.0), sequence_length=8, batch_sequences=4)
>>> order = Order(sizes, [stage], lanes=2, window_chunks=2, seed=1)
>>> def names(samples):
...     at = order.locate(samples)
...     return " ".join(f"{'wc'[s]}{c}.{q}" for s, c, q in zip(at.source, at.chunk, at.sequence, strict=True))
>>> names(np.arange(0, 16, 2))  # lane 0: the even samples
'w3.0 w0.1 c1.0 w3.1 w0.0 w1.1 c0.1 w4.1'
>>> names(np.arange(1, 16, 2))  # lane 1: the odd samples
'w5.0 w5.1 w2.0 c3.0 w2.1 w6.1 w6.0 c2.1'
>>> order.epochs(16)  # 12 of the 16 sequences of w have been read, and 4 of the 8 of c
[0.75, 0.5]

Each lane draws from w three times out of four. Lane 0 reads the four sequences of its first window, w3 and w0, in
shuffled order before it begins the window of w1 and w4. Lane 1 reads different chunks: within an epoch
no chunk is on two lanes.

**1. Lanes.** Sample i is on lane v = i mod V, at position p = i div V of that lane. Lanes are virtual: V is
fixed for a run while the number of ranks is not (`rank_samples` says which samples a rank reads).

**2. Mixture.** The weights become integer quotas q_k over a period of P = 2^16 positions. Source k has
q_k places in a period, and the ideal position of its j-th place is (j + 1/2) / q_k of the period; sorting all places
by their ideal position interleaves the sources evenly. Every lane repeats this pattern, rotated by a different amount,
so that at any time the lanes, and thus every batch, hold different sources. The number of samples of source k that
precede a position of a lane,
    n = begin[v, k] + (whole periods) q_k + (places of k before this one in the period) - (those before the rotation),
is a table look-up. Over a period the shares are exact, and because the pattern repeats, they do not drift: on a lane
the count of a source never differs from its quota by more than the number of sources. A data stage with other weights
may begin at any sample. It starts the pattern anew, and its `begin` holds the counts of all earlier stages, so that
no source loses or repeats a sample.

A data stage may have longer sequences, T' = m T. For each source, a lane first reads the rest of the window (see 4)
that it has begun: m short sequences, in their permuted order, make one long sequence, and the last long sequence may be
padded. From the next window on, the lane reads sequences of T' tokens. So here, too, no token is lost or read twice.

A run that ends with an epoch has a last stage that closes it (`DataStage.closes_epochs`). A source is not drawn after
the last step before which no lane leaves the epoch in it, and the stage begins where this has happened to all sources.
What each lane has left of each source is a number, and `Remainder` deals these samples evenly over lanes and sources.
The stage has no other samples, so each sequence is read exactly as often as there are epochs; the last step may have
fewer samples than the others. Each lane keeps its own order here too, so a next stage continues as after any other.

**3. Chunks to lanes.** The epochs of a source are concatenated to one stream of chunks, g = e N + ordinal, which
is dealt round robin: lane g mod V, row g div V. Each chunk thus belongs to one lane per epoch. Lanes that have
drawn the same number n of samples are in the same row or in adjacent ones, so no lane gets whole epochs ahead of
the others.

The last chunk may be short by d = C - C_last sequences. If it fell on the same lane in every epoch, as it
would where V divides N, that lane would run ahead. So in epoch e it gets the ordinal
    s(e) = (e div (V/G)) mod G,    G = gcd(V, N) <= N,
and over V epochs (N rows) each lane has it exactly once: as e runs over V/G consecutive epochs, e N mod V
runs over all multiples of G, and the values 0..G-1 of s(e) over the blocks of V/G epochs fill the gaps. On lane
v = a G + b the last chunk occurs in the epochs with s(e) = b and e N = a G (mod V), that is (mod V)
    e = b (V/G) + (a (N/G)^-1 mod V/G),
and therefore in row k0 = (e N + b - v) / V, and in every N-th row after that. In closed form
    samples_before(row) = row C - d ceil((row - k0) / N)
    row_of(n) = q N + (r div C if r < k0 C + C_last else (r + d) div C),   q, r = divmod(n, N C - d).

**4. Shuffling.** The ordinals of an epoch are a permutation of its chunks, and the sequences of W successive
rows of a lane (a window, which never crosses an epoch) are permuted. Both are Feistel networks with cycle
walking: a bijection of any size, evaluated at one point, without a table. So a lane uses W chunks at a
time, and they are known in advance, as prefetching requires.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pretrain.config.data_stages import MAX_SAMPLES, DataStage, stage_at
from pretrain.corpus.manifest import Manifest
from pretrain.data.mixture import PERIOD, Remainder, interleave, quotas
from pretrain.data.permutation import Ints, key_of, permute, unpermute

_ROTATION = 40503  # odd, and close to P / golden ratio: lanes start at places that are all different and evenly spread
_CHUNKS, _SEQUENCES = 0, 1  # the kind of a permutation, which is part of its key


@dataclass(frozen=True)
class SourceSize:
    """The sizes of a corpus on which the order depends."""

    n_chunks: int
    """Number of chunks."""
    chunk_tokens: int
    """Number of tokens in every chunk except the last one."""
    last_chunk_tokens: int
    """Number of tokens in the last chunk."""

    @classmethod
    def of(cls, corpus: Manifest) -> SourceSize:
        """The sizes of a corpus, from its manifest."""
        return cls(corpus.n_chunks, corpus.chunk_tokens, corpus.last_chunk_tokens)

    def sequences_per_chunk(self, sequence_length: int) -> tuple[int, int]:
        """C and C_last: sequences in a full chunk, and in the last one, whose last sequence may be padded."""
        return self.chunk_tokens // sequence_length, -(-self.last_chunk_tokens // sequence_length)


class Location(NamedTuple):
    """Where samples are in the corpora, as int64 arrays with one entry per part.

    A sample has several parts only where the sequence length has just grown.
    """

    source: Ints
    """Number of the source in the mixture."""
    epoch: Ints
    """Epoch of the source, counted from 0."""
    chunk: Ints
    """Number of the chunk within its corpus."""
    sequence: Ints
    """Number of the sequence within its chunk; its first token is token `sequence * length` of the chunk."""
    length: Ints
    """Number of tokens in the part; fewer where its chunk ends earlier."""
    request: Ints
    """Index, among the requested samples, of the sample that the part belongs to; ascending."""


class SamplesOfChunk(NamedTuple):
    """The samples that contain tokens of one chunk, as int64 arrays with one entry per sequence."""

    sample: Ints
    """Index of the sample in the order."""
    sequence: Ints
    """Number of the sequence within the chunk."""
    epoch: Ints
    """Epoch of the source, counted from 0."""
    length: Ints
    """Number of tokens in the sequence."""


class Order:
    """The order of all samples of a run.

    The first stage begins at sample 0. The tables take about (0.9 MB + 40 B x lanes x sources) per stage.
    """

    def __init__(
        self,
        sizes: Sequence[SourceSize],
        stages: Sequence[DataStage],
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
        """Pickle only the arguments, so that the message to a worker process is small (see `Corpus.__reduce__`)."""
        return _order_of, self._arguments

    def with_stages(self, stages: Sequence[DataStage]) -> Order:
        """The same order with other stages."""
        sizes, _, *rest = self._arguments
        return _order_of(sizes, stages, *rest)

    def _build_stages(self) -> None:
        """Build the tables of all stages: pattern [S, P], ranks of places [S, P], quotas [S, K], and lane states."""
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
        )  # places that the rotation skips
        self._places: list[list[Ints]] = []
        self._begin: list[_Begin] = []
        self._remainders: dict[int, Remainder] = {}  # of the stages that close epochs
        begin = _Begin(*np.zeros((4, self.lanes, n_sources), np.int64))
        for s in range(n_stages):
            self._pattern[s] = interleave(self._quotas[s])
            self._places.append([np.flatnonzero(self._pattern[s] == k) for k in range(n_sources)])
            for mine in self._places[s]:
                self._rank[s, mine] = np.arange(len(mine))
            self._skipped[s] = self._places_before(s, self._rotation)
            self._begin.append(begin)
            if (n_epochs := self._parts[s].closes_epochs) is not None:
                self._remainders[s] = Remainder(self._left(s, n_epochs).ravel())
            if s + 1 < n_stages:
                begin = self._next_begin(s)
        self._starts = _Begin(*(np.stack(tables) for tables in zip(*self._begin, strict=True)))  # [S, V, K]

    def _places_before(self, stage: int, end: Ints) -> Ints:
        """Number of each source's places in the period that are before `end`: [len(end), K]."""
        return np.stack([np.searchsorted(mine, end) for mine in self._places[stage]], axis=1)

    def _left(self, stage: int, n_epochs: int) -> Ints:
        """Number of samples of the first `n_epochs` epochs that are left when a stage begins: [V, K]."""
        begin = self._begin[stage]
        source, lane = np.broadcast_arrays(np.arange(begin.n.shape[1]), np.arange(self.lanes)[:, None])
        rows = self._lane_rows(self._length[stage], source, lane)
        end = rows.samples_before(self._first_row(rows, lane, np.array(n_epochs)))
        parts = -(-begin.rest // self._parts_per_sample(stage, begin.rest_length))
        return parts + np.maximum(0, end - begin.n)

    def samples_left(self, stage: int = -1) -> int:
        """Number of samples in a stage that closes epochs: in `stages[stage]`, which must be such a stage."""
        first = self.stages[stage].first_sample
        part = max(s for s in self._remainders if self._first_sample[s] <= first)
        return self._remainders[part].total + int(self._first_sample[part]) - first

    def _drawn(self, stage: int, sample: int) -> Ints:
        """Number of samples that each lane draws from each source between the stage's start and `sample`: [V, K]."""
        if stage in self._remainders:
            drawn = self._remainders[stage].drawn_before(sample - int(self._first_sample[stage]))
            return drawn.reshape(self.lanes, -1)
        position = -((np.arange(self.lanes) - sample) // self.lanes)
        end = self._rotation + position - self._first_position[stage]
        drawn = (end // PERIOD)[:, None] * self._quotas[stage] + self._places_before(stage, end % PERIOD)
        return drawn - self._skipped[stage]

    def _next_begin(self, stage: int) -> _Begin:
        """Where each lane continues in each source when the next stage begins."""
        begin = self._begin[stage]
        drawn = self._drawn(stage, int(self._first_sample[stage + 1]))
        per = self._parts_per_sample(stage, begin.rest_length)
        rest = np.maximum(0, begin.rest - drawn * per)
        first = begin.rest_first + begin.rest - rest
        n = begin.n + np.maximum(0, drawn + -begin.rest // per)
        if self._length[stage + 1] == self._length[stage]:
            return _Begin(n, first, rest, begin.rest_length)
        # Sequences are longer from here on. A window that has been begun is read to its end in short sequences.
        source, lane = np.broadcast_arrays(np.arange(n.shape[1]), np.arange(self.lanes)[:, None])
        rows = self._lane_rows(self._length[stage], source, lane)
        _, low, high = self._window(rows, lane, rows.row_of(n))
        fresh = rows.samples_before(low) == n
        row = np.where(fresh, low, high)
        own = np.where(fresh, 0, rows.samples_before(high) - n)
        after = self._lane_rows(self._length[stage + 1], source, lane).samples_before(row)
        in_rest = (
            rest > 0
        )  # the rest has an even shorter length, so nothing after its window has been read yet
        return _Begin(
            after,
            np.where(in_rest, first, n),
            np.where(in_rest, rest, own),
            np.where(in_rest, begin.rest_length, self._length[stage]),
        )

    def _parts_per_sample(self, stage: int | Ints, rest_length: Ints) -> Ints:
        lengths = np.array(self._lengths, np.int64)
        return lengths[self._length[stage]] // lengths[rest_length]

    def locate(self, samples: Ints) -> Location:
        """Where the samples with these global indices (1-D, in any order) are. Exact even for indices above 10^12.

        A sample after the last one of a stage that closes epochs is empty: it has no part.
        """
        samples = np.asarray(samples, np.int64)
        stage = np.searchsorted(self._first_sample, samples, side="right") - 1
        request, stage, lane, source, drawn = self._dealt(samples, stage)
        begin = _Begin(*(table[stage, lane, source] for table in self._starts))
        length = self._length[stage]
        if not begin.rest.any():
            return self._place(request, length, source, lane, begin.n + drawn)
        per = self._parts_per_sample(stage, begin.rest_length)
        taken = drawn * per
        in_rest = taken < begin.rest
        n_parts = np.where(in_rest, np.minimum(per, begin.rest - taken), 1)
        n = np.where(in_rest, begin.rest_first + taken, begin.n + drawn + -begin.rest // per)
        part_of = np.repeat(np.arange(len(request)), n_parts)
        within = np.arange(len(part_of)) - np.repeat(np.cumsum(n_parts) - n_parts, n_parts)
        length = np.where(in_rest, begin.rest_length, length)[part_of]
        return self._place(request[part_of], length, source[part_of], lane[part_of], n[part_of] + within)

    def _dealt(self, samples: Ints, stage: Ints) -> tuple[Ints, Ints, Ints, Ints, Ints]:
        """Which samples are not empty, and of each its stage, lane, source, and earlier draws from it in the stage."""
        request = np.arange(len(samples))
        lane, position = samples % self.lanes, samples // self.lanes
        source, drawn = self._draw(stage, lane, position)
        is_filled = np.ones(len(samples), np.bool_)
        for closing, rest in self._remainders.items():
            mine = np.flatnonzero(stage == closing)
            index = samples[mine] - self._first_sample[closing]
            is_filled[mine] = index < rest.total
            mine, index = mine[index < rest.total], index[index < rest.total]
            cell, drawn[mine] = rest.dealt(index)
            lane[mine], source[mine] = np.divmod(cell, self._quotas.shape[1])
        return request[is_filled], stage[is_filled], lane[is_filled], source[is_filled], drawn[is_filled]

    def _place(self, request: Ints, length: Ints, source: Ints, lane: Ints, n: Ints) -> Location:
        """Where the n-th sequence of a source on a lane is. `length` is an index into `_lengths`."""
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
        return Location(source, epoch, chunk, n - rows.samples_before(place), tokens, request)

    def _first_row(self, rows: _LaneRows, lane: Ints, epoch: Ints) -> Ints:
        return -((lane - epoch * rows.n_chunks) // self.lanes)  # ceil((e N - v) / V)

    def _window(self, rows: _LaneRows, lane: Ints, row: Ints) -> tuple[Ints, Ints, Ints]:
        """Epoch of a row, and its window: up to W rows [low, high) of the lane, all in that epoch."""
        epoch = (row * self.lanes + lane) // rows.n_chunks
        first = self._first_row(rows, lane, epoch)
        low = first + (row - first) // self.window_chunks * self.window_chunks
        return epoch, low, np.minimum(low + self.window_chunks, self._first_row(rows, lane, epoch + 1))

    def _draw(self, stage: Ints, lane: Ints, position: Ints) -> tuple[Ints, Ints]:
        """Source of each sample, and the number of samples of that source that the lane drew earlier in the stage."""
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
        """The chunk that has this ordinal in this epoch. A short last chunk has the fixed ordinal s(e)."""
        # Use the first stage's length: with longer sequences the last chunk may not count as short, and the order would
        # change.
        is_short = self._missing[0, source] > 0
        common, last = self._common[source], self._n_chunks[source] - 1
        place = epoch // (self.lanes // common) % common
        rest = ordinal - (is_short & (ordinal > place))
        size = np.maximum(last + 1 - is_short, 1)
        shuffled = permute(np.minimum(rest, size - 1), size, key_of(self.seed, _CHUNKS, source, epoch))
        return np.where(is_short & (ordinal == place), last, shuffled)

    def find(self, source: int, chunk: int, end_sample: int) -> SamplesOfChunk:
        """All samples before `end_sample` that contain tokens of a chunk: the inverse of `locate`."""
        begun = math.ceil(self.chunks_read(end_sample)[:, source].max())  # on the lane that is furthest ahead
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
        return SamplesOfChunk(*(column[kept][ascending] for column in found))

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
        """The indices n, counted within the source, of a lane's draws of the sequences of a row; and the sequences."""
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
        """The samples that are a lane's n-th sequences of a source and length, each with its index into `n`."""
        for s, quota in enumerate(self._quotas[:, source].tolist()):
            begin = _Begin(*(table[s, lane, source] for table in self._starts))
            per = self._parts_per_sample(s, begin.rest_length)
            is_own = (n >= begin.n) & (length == self._length[s])
            in_rest = (n >= begin.rest_first) & (n < begin.rest_first + begin.rest)
            for drawn, mask in (
                (n - begin.n - -begin.rest // per, is_own),
                ((n - begin.rest_first) // per, in_rest & (length == begin.rest_length)),
            ):
                if s + 1 < len(self._parts):
                    mask &= drawn < self._drawn(s, self._parts[s + 1].first_sample)[lane, source]
                elif s in self._remainders:
                    mask &= drawn < self._drawn(s, MAX_SAMPLES)[lane, source]
                which = np.flatnonzero(mask & (quota > 0))
                if len(which):
                    yield self._sample(s, source, lane, drawn[which]), which

    def _sample(self, stage: int, source: int, lane: int, drawn: Ints) -> Ints:
        """The inverse of `_draw`, or in a stage that closes epochs, of how its remainder is dealt."""
        if stage in self._remainders:
            cell = lane * self._quotas.shape[1] + source
            return self._first_sample[stage] + self._remainders[stage].sample(cell, drawn)
        turn, rank = np.divmod(drawn + self._skipped[stage, lane, source], self._quotas[stage, source])
        place = self._places[stage][source][rank]
        position = turn * PERIOD + place - self._rotation[lane] + self._first_position[stage, lane]
        return position * self.lanes + lane

    def chunks_read(self, sample: int) -> NDArray[np.float64]:
        """Number of chunks of each source that each lane has read before `sample`, including fractions: [V, K]."""
        stage = stage_at(self._parts, sample)
        begin, drawn = self._begin[stage], self._drawn(stage, sample)
        per = self._parts_per_sample(stage, begin.rest_length)
        n = begin.n + np.maximum(0, drawn + -begin.rest // per)
        source, lane = np.broadcast_arrays(np.arange(n.shape[1]), np.arange(self.lanes)[:, None])
        rows = self._lane_rows(self._length[stage], source, lane)
        row = rows.row_of(n)
        within = (n - rows.samples_before(row)) / rows.per_chunk
        rest = np.maximum(0, begin.rest - drawn * per) / self._per_chunk[begin.rest_length, source]
        return row + within - rest

    def epochs(self, sample: int) -> list[float]:
        """Number of epochs of each source read before `sample`, counted in chunks; a short last chunk counts as one."""
        return (self.chunks_read(sample).sum(axis=0) / self._n_chunks).tolist()

    def read_beyond(self, max_epochs: Sequence[int | None], sample: int) -> list[int]:
        """The sources from which any lane draws more than `max_epochs` epochs before `sample`; None means no limit."""
        limited = np.array([source for source, most in enumerate(max_epochs) if most is not None], np.int64)
        n_chunks = np.array([most for most in max_epochs if most is not None]) * self._n_chunks[limited]
        end = -((np.arange(self.lanes)[:, None] - n_chunks) // self.lanes)
        return limited[(self.chunks_read(sample)[:, limited] > end).any(axis=0)].tolist()


def _distinct(stages: Sequence[DataStage]) -> list[DataStage]:
    """The stages, except those that change only the batch size, which does not affect the order."""

    def content(stage: DataStage) -> tuple[list[int], int, int | None]:
        return quotas(stage.drawn_weights), stage.sequence_length, stage.closes_epochs

    kept = [stages[0]]
    for stage in stages[1:]:
        if content(stage) != content(kept[-1]):
            kept.append(stage)
    return kept


class _Begin(NamedTuple):
    """Where each lane continues in each source when a stage begins.

    The rest is the unread part of a window that was begun with shorter sequences.
    """

    n: Ints
    """Number of sequences, counted in the stage's length, before the first one after the rest."""
    rest_first: Ints
    """Number of the first sequence in the rest."""
    rest: Ints
    """Number of sequences in the rest."""
    rest_length: Ints
    """Length of the sequences in the rest, as an index into the order's lengths."""


class _LaneRows(NamedTuple):
    """The rows (chunks) of one source on one lane, for arrays of (source, lane) pairs."""

    n_chunks: Ints
    """N: chunks per epoch."""
    per_chunk: Ints
    """C: sequences in a full chunk."""
    missing: Ints
    """d: number of sequences by which the corpus's last chunk is shorter than a full one."""
    short_row: Ints
    """k0: the first row that holds the last chunk; every n_chunks-th row after it holds that chunk too."""

    def samples_before(self, row: Ints) -> Ints:
        shorts = (row - self.short_row + self.n_chunks - 1) // self.n_chunks
        return row * self.per_chunk - self.missing * shorts

    def row_of(self, n: Ints) -> Ints:
        per_turn = self.n_chunks * self.per_chunk - self.missing
        turn, rest = n // per_turn, n % per_turn
        after_short = rest >= (self.short_row + 1) * self.per_chunk - self.missing
        return turn * self.n_chunks + (rest + self.missing * after_short) // self.per_chunk


def _order_of(
    sizes: Sequence[SourceSize], stages: Sequence[DataStage], lanes: int, window_chunks: int, seed: int
) -> Order:
    return Order(sizes, stages, lanes=lanes, window_chunks=window_chunks, seed=seed)
