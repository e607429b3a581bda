"""From places in the order to the arrays that a model reads: sequences, their labels, positions and documents."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pretrain.config import BadChunk, DataConfig, Packing, RunError
from pretrain.manifest import CorruptShardError
from pretrain.order import Location
from pretrain.order_state import Substitution
from pretrain.packing import Segments, best_fit, concat
from pretrain.permutation import Ints, key_of
from pretrain.shards import Corpus

IGNORED_LABEL = -100
"""Label of a position at which nothing is to be predicted."""
_PACKED_CHUNKS = 64  # whose packing is kept; a rank reads W chunks per lane and source at a time
_SUBSTITUTES_TRIED = 8

Packed = NDArray[np.int32]


class Counts(NamedTuple):
    """How documents fell into sequences."""

    pieces: int = 0
    """Documents, or parts of them, counted once per sequence."""
    cut: int = 0
    """Those that are not a whole document."""
    padding: int = 0
    """Tokens."""


@dataclass
class Sequences:
    """B sequences of T tokens."""

    packed: Packed
    """int32 [4, B, T]: tokens, labels, positions, document ids."""
    counts: Counts
    substitutions: list[Substitution] = field(default_factory=list)
    """Chunks that could not be read, found while reading these."""


class _Row(NamedTuple):
    """A piece of a row."""

    tokens: NDArray[np.int32]
    labels: NDArray[np.int32]
    begins: NDArray[np.bool_]
    """Where a document begins; the first is always True."""
    cut: int


class SequenceReader:
    """Reads sequences from corpora. `substitutions` are those that the run has made so far."""

    def __init__(
        self,
        corpora: Sequence[Corpus],
        data: DataConfig,
        seed: int = 0,
        substitutions: Sequence[Substitution] = (),
    ) -> None:
        self._corpora, self._seed = corpora, seed
        self._masking = data.document_masking
        self._best_fit = data.packing is Packing.best_fit
        self._stops = data.on_bad_chunk is BadChunk.stop
        self._substitutions = {(s.source, s.epoch, s.chunk): s for s in substitutions}
        self._packings: OrderedDict[tuple[int, int, int], Segments] = OrderedDict()

    def read(self, where: Location, samples: Ints, sequence_length: int) -> Sequences:
        """The sequences at `where`, one row per sample. Raises CorruptShardError, and RunError without a substitute."""
        n = len(samples)
        tokens = np.empty((n, sequence_length), np.int32)
        labels = np.full((n, sequence_length), IGNORED_LABEL, np.int32)
        begins = np.zeros((n, sequence_length), np.bool_)
        filled = [0] * n
        pieces = cut = 0
        found: list[Substitution] = []
        for source, epoch, chunk, sequence, length, row in zip(*(a.tolist() for a in where), strict=True):
            place = (source, epoch, chunk, int(samples[row]))
            for part in self._read_piece(place, sequence, length, found):
                start, stop = filled[row], filled[row] + len(part.tokens)
                tokens[row, start:stop] = part.tokens
                labels[row, start:stop] = part.labels
                begins[row, start:stop] = part.begins
                filled[row] = stop
                pieces += int(part.begins.sum())
                cut += part.cut
        for row, stop in enumerate(filled):
            if stop < sequence_length:
                tokens[row, stop:] = self._corpora[int(where.source[0])].manifest.eos_id
                begins[row, stop] = True
        packed = np.empty((4, n, sequence_length), np.int32)
        packed[0], packed[1] = tokens, labels
        packed[2] = np.arange(sequence_length, dtype=np.int32)
        if self._masking:
            begins[:, 0] = False  # documents of a row are counted from 0
            packed[2] -= np.maximum.accumulate(np.where(begins, packed[2], 0), axis=1)
            np.cumsum(begins, axis=1, out=packed[3])
        else:
            packed[3] = 0
        return Sequences(packed, Counts(pieces, cut, n * sequence_length - sum(filled)), found)

    def prefetch(self, where: Location) -> None:
        """Begin to fetch the chunks of these places, the first ones first."""
        for source, corpus in enumerate(self._corpora):
            chunks = dict.fromkeys(where.chunk[where.source == source].tolist())
            corpus.prefetch(list(chunks))

    def _read_piece(
        self, place: tuple[int, int, int, int], sequence: int, length: int, found: list[Substitution]
    ) -> list[_Row]:
        source, epoch, chunk, sample = place
        known = self._substitutions.get((source, epoch, chunk))
        if known is not None and sample >= known.first_sample:
            return self._rows(source, known.substitute, sequence, length)
        try:
            return self._rows(source, chunk, sequence, length)
        except (CorruptShardError, OSError) as error:
            if self._stops:
                raise
            reason = str(error)
        for substitute in self._substitutes(source, epoch, chunk):
            try:
                rows = self._rows(source, substitute, sequence, length)
            except (CorruptShardError, OSError):
                continue
            entry = Substitution(
                source=source,
                epoch=epoch,
                chunk=chunk,
                first_sample=sample,
                substitute=substitute,
                reason=reason,
            )
            self._substitutions[source, epoch, chunk] = entry
            found.append(entry)
            return rows
        raise RunError(
            f"{reason}; and {_SUBSTITUTES_TRIED} chunks that would stand in for it cannot be read either"
        )

    def _substitutes(self, source: int, epoch: int, chunk: int) -> list[int]:
        """Chunks to be tried in place of a bad one: the same on every rank, and at every restart."""
        n_full = self._corpora[source].n_chunks - 1  # the last one may have fewer sequences
        tries = np.arange(4 * _SUBSTITUTES_TRIED)
        keys = key_of(self._seed, source, epoch, chunk, tries)
        drawn = [int(key % np.uint64(max(n_full, 1))) for key in keys]
        return [other for other in dict.fromkeys(drawn) if other != chunk][:_SUBSTITUTES_TRIED]

    def _rows(self, source: int, chunk: int, sequence: int, length: int) -> list[_Row]:
        corpus = self._corpora[source]
        n_tokens = corpus.tokens_in(chunk)
        if self._best_fit:
            segments = self._packing(source, chunk, length)[sequence]
        else:
            segments = concat(n_tokens, length, sequence)
        return [self._segment(corpus, chunk, start, stop) for start, stop in segments]

    def _segment(self, corpus: Corpus, chunk: int, start: int, stop: int) -> _Row:
        read = corpus.read(chunk, start, stop + 1).astype(np.int32)  # one beyond: the last label
        tokens = read[: stop - start]
        labels = np.full(len(tokens), IGNORED_LABEL, np.int32)
        labels[: len(read) - 1] = np.where(
            corpus.is_target(chunk, start + 1, start + len(read)), read[1:], IGNORED_LABEL
        )
        begins = np.zeros(len(tokens) + 1, np.bool_)
        if not self._masking:
            return _Row(tokens, labels, begins[:-1], 0)
        documents = corpus.documents(chunk)
        low, high = documents.starts.searchsorted((start, stop + 1))
        begins[documents.starts[low:high] - start] = True
        labels[begins[1:]] = IGNORED_LABEL
        whole_first = begins[0] and documents.offsets[low] == 0
        whole_last = begins[-1] or tokens[-1] == corpus.manifest.eos_id
        begins[0] = True
        n = int(begins[:-1].sum())
        cut = int(not whole_first) + int(not whole_last) if n > 1 else int(not (whole_first and whole_last))
        return _Row(tokens, labels, begins[:-1], cut)

    def _packing(self, source: int, chunk: int, length: int) -> Segments:
        key = (source, chunk, length)
        if key not in self._packings:
            corpus = self._corpora[source]
            self._packings[key] = best_fit(corpus.documents(chunk).starts, corpus.tokens_in(chunk), length)
            if len(self._packings) > _PACKED_CHUNKS:
                self._packings.popitem(last=False)
        self._packings.move_to_end(key)
        return self._packings[key]
