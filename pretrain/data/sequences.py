"""Turns positions in the order into the arrays that a model reads: tokens, labels, positions and document ids."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pretrain.batch import IGNORED_LABEL, Counts
from pretrain.config import BadChunk, DataConfig, Packing
from pretrain.corpus.manifest import CorruptShardError
from pretrain.corpus.shards import Corpus
from pretrain.data.masking import Masking
from pretrain.data.order import Location
from pretrain.data.packing import Segments, best_fit, ranges_of
from pretrain.data.permutation import Ints, key_of
from pretrain.data.state import Substitution, chunk_read
from pretrain.errors import RunError

_PACKED_CHUNKS = 512  # cached packings, 60 KB each; W chunks per lane and source are used at a time
_SUBSTITUTES_TRIED = 8
_READ_TRIES = 3  # limited, so that a chunk that is only sometimes readable cannot block a run forever
_NOTHING = np.empty(0, np.uint16)

Packed = NDArray[np.int32]


@dataclass
class Sequences:
    """B sequences of T tokens."""

    packed: Packed
    """int32 [4, B, T]: tokens, labels, positions, document ids."""
    counts: Counts
    """How documents were split over the sequences."""
    proposed: list[Substitution] = field(default_factory=list)
    """Chunks that could not be read, each with one that could. If there are any, the sequences are not filled: they are
    read again once all ranks have agreed on the substitutes."""


class _Segment(NamedTuple):
    """Tokens [start, stop) of a chunk that are copied to a row."""

    row: int
    """Row of the batch."""
    source: int
    """Number of the source in the mixture."""
    chunk: int
    """Number of the chunk in its corpus."""
    start: int
    """Index of the first token in the chunk."""
    stop: int
    """Index after the last token in the chunk."""


class SequenceReader:
    """Reads sequences from corpora, and replaces bad chunks according to the run's `substitutions` so far.

    It makes no substitution of its own. It proposes one, because another process may find the same chunk bad at another
    sample, or be unable to read the substitute, and all of them have to read the same.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        data: DataConfig,
        seed: int = 0,
        substitutions: Sequence[Substitution] = (),
        masking: Masking | None = None,
    ) -> None:
        """With `masking`, tokens are hidden, and a label is the hidden token itself instead of the next token."""
        self._corpora, self._seed = corpora, seed
        self._hides = masking
        self._masking = data.document_masking
        self._best_fit = data.packing is Packing.best_fit
        self._stops = data.on_bad_chunk is BadChunk.stop
        self._substitutions: dict[tuple[int, int, int], list[Substitution]] = {}
        for entry in substitutions:
            self._substitutions.setdefault((entry.source, entry.epoch, entry.chunk), []).append(entry)
        self._packings: OrderedDict[tuple[int, int, int], Segments] = OrderedDict()

    def read(self, where: Location, samples: Ints, sequence_length: int) -> Sequences:
        """The sequences at `where`, one row per sample; or, if some chunks are bad, proposals to substitute them.

        Raises CorruptShardError or OSError if a chunk cannot be read, and RunError if no other chunk can replace it.
        """
        for _ in range(_READ_TRIES):
            try:
                segments = self._segments(where, samples)
                found = self._fill(segments, len(samples), sequence_length)
                if self._hides is not None:
                    self._hides.apply(found.packed[0], found.packed[1], samples)
                return found
            except (CorruptShardError, OSError) as error:
                if self._stops:
                    raise
                problem = error
            if proposed := self._propose_substitutes(where, samples):
                return Sequences(np.zeros((4, len(samples), 0), np.int32), Counts(), proposed)
        raise problem

    def prefetch(self, where: Location) -> None:
        """Start to fetch the chunks at these positions, in this order, and return."""
        for source, corpus in enumerate(self._corpora):
            chunks = dict.fromkeys(where.chunk[where.source == source].tolist())
            corpus.prefetch(list(chunks))

    def _segments(self, where: Location, samples: Ints) -> list[_Segment]:
        """The segments of all rows, in row order."""
        segments = []
        for source, epoch, chunk, sequence, length, row in zip(*(a.tolist() for a in where), strict=True):
            chunk = self._chunk(source, epoch, chunk, int(samples[row]))
            corpus = self._corpora[source]
            if self._best_fit and corpus.manifest.packed is None:
                ranges = self._packing(source, chunk, length)[sequence]
            else:
                ranges = ranges_of(corpus, chunk, length, sequence)
            segments += [_Segment(row, source, chunk, start, stop) for start, stop in ranges]
        return segments

    def _fill(self, segments: list[_Segment], n: int, sequence_length: int) -> Sequences:
        packed = np.empty((4, n, sequence_length), np.int32)
        tokens, labels = packed[0], packed[1]
        labels[:] = IGNORED_LABEL
        ahead = 1 if self._hides is None else 0  # how far a label is from its position
        begins = np.zeros((n, sequence_length), np.bool_)
        filled = [0] * n
        pieces = cut = 0
        for segment, read in zip(segments, self._read_tokens(segments), strict=True):
            row, begin = segment.row, filled[segment.row]
            size = segment.stop - segment.start
            end = filled[row] = begin + size
            tokens[row, begin:end] = read[:size]
            labels[row, begin:end][: len(read) - ahead] = read[ahead : size + ahead]
            corpus = self._corpora[segment.source]
            if corpus.manifest.loss_mask:
                targets = corpus.is_target(segment.chunk, segment.start + ahead, segment.stop + ahead)
                labels[row, begin:end][~targets] = IGNORED_LABEL
            if (classes := corpus.manifest.classes) and (found := labels[row, begin:end].max()) >= len(
                classes
            ):
                raise CorruptShardError(
                    f"{corpus.manifest_path}: chunk {segment.chunk} has a document of class {found}, and its manifest "
                    f"names {len(classes)} classes, numbered from 0; prepare the corpus again"
                )
            if self._masking:
                n_pieces, n_cut = self._mark(
                    segment, begins[row, begin:end], labels[row, begin:end], read[size - 1]
                )
                pieces, cut = pieces + n_pieces, cut + n_cut
        eos_id = self._corpora[0].manifest.eos_id
        for row, stop in enumerate(filled):
            if stop < sequence_length:
                tokens[row, stop:] = eos_id
                begins[row, stop] = True
        padding = sum(
            sequence_length - stop for stop in filled if stop
        )  # an empty sample is none of the step's
        packed[2] = np.arange(sequence_length, dtype=np.int32)
        if self._masking:
            begins[:, 0] = False  # documents of a row are counted from 0
            packed[2] -= np.maximum.accumulate(np.where(begins, packed[2], 0), axis=1)
            np.cumsum(begins, axis=1, out=packed[3])
        else:  # text must not see padding where it sees what follows
            packed[3] = 0 if self._hides is None else packed[2] >= np.array(filled)[:, None]
        return Sequences(packed, Counts(pieces, cut, padding))

    def _read_tokens(self, segments: list[_Segment]) -> list[NDArray[np.integer]]:
        """The tokens of each segment, plus the token after it if its chunk has one, which is the last label.

        What follows a segment of whole documents is another document or filler, and no label.
        """
        read: list[NDArray[np.integer]] = [_NOTHING] * len(segments)
        for source, corpus in enumerate(self._corpora):
            mine = [i for i, segment in enumerate(segments) if segment.source == source]
            more = 1 if corpus.manifest.packed is None else 0
            ranges = [(segments[i].chunk, segments[i].start, segments[i].stop + more) for i in mine]
            for i, tokens in zip(mine, corpus.read_many(ranges), strict=True):
                read[i] = tokens
        return read

    def _mark(
        self, segment: _Segment, begins: NDArray[np.bool_], labels: NDArray[np.int32], last: np.integer
    ) -> tuple[int, int]:
        """Mark where documents begin, and mask the labels that belong to the next document.

        Returns the number of pieces of documents, and of those that are not a whole document.
        """
        corpus = self._corpora[segment.source]
        documents = corpus.documents(segment.chunk)
        low, high = documents.starts.searchsorted((segment.start, segment.stop))
        at = documents.starts[low:high] - segment.start
        begins[at] = True
        is_packed = corpus.manifest.packed is not None
        ends = is_packed or (high < len(documents.starts) and documents.starts[high] == segment.stop)
        if self._hides is None:
            labels[at[at > 0] - 1] = IGNORED_LABEL
            if ends:
                labels[-1] = IGNORED_LABEL
        whole_first = len(at) > 0 and at[0] == 0 and documents.offsets[low] == 0
        whole_last = ends or last == corpus.manifest.eos_id
        n = len(at) + (len(at) == 0 or at[0] > 0)
        begins[0] = True
        return n, (not whole_first) + (not whole_last) if n > 1 else int(not (whole_first and whole_last))

    def _chunk(self, source: int, epoch: int, chunk: int, sample: int) -> int:
        """The chunk to read where the order says `chunk`."""
        return chunk_read(self._substitutions.get((source, epoch, chunk), []), chunk, sample)

    def _propose_substitutes(self, where: Location, samples: Ints) -> list[Substitution]:
        """Try to read each chunk at these positions separately, and choose substitutes for the unreadable ones."""
        found: dict[tuple[int, int, int], Substitution] = {}
        for source, epoch, chunk, _, _, row in zip(*(a.tolist() for a in where), strict=True):
            sample, key = int(samples[row]), (source, epoch, chunk)
            if key in found:
                continue
            reason = self._problem(source, self._chunk(source, epoch, chunk, sample))
            if reason is None:
                continue
            used = {entry.substitute for entry in self._substitutions.get(key, [])}
            candidates = [other for other in self._substitutes(source, epoch, chunk) if other not in used]
            good = next((other for other in candidates if self._problem(source, other) is None), None)
            if good is None:
                raise RunError(
                    f"{reason}; and {_SUBSTITUTES_TRIED} chunks that would stand in for it cannot be read either"
                )
            found[key] = Substitution(
                source=source, epoch=epoch, chunk=chunk, first_sample=sample, substitute=good, reason=reason
            )
        return list(found.values())

    def _problem(self, source: int, chunk: int) -> str | None:
        """Why a chunk cannot be read; None if it can."""
        corpus = self._corpora[source]
        try:
            corpus.read(chunk, 0, corpus.chunk_tokens)
            corpus.documents(chunk)
        except (CorruptShardError, OSError) as error:
            return str(error)
        return None

    def _substitutes(self, source: int, epoch: int, chunk: int) -> list[int]:
        """Chunks to try in place of a bad one. They are the same on every rank and after every restart."""
        n_full = self._corpora[source].n_chunks - 1  # the last chunk may have fewer sequences
        tries = np.arange(4 * _SUBSTITUTES_TRIED)
        keys = key_of(self._seed, source, epoch, chunk, tries)
        drawn = [int(key % np.uint64(max(n_full, 1))) for key in keys]
        return [other for other in dict.fromkeys(drawn) if other != chunk][:_SUBSTITUTES_TRIED]

    def _packing(self, source: int, chunk: int, length: int) -> Segments:
        key = (source, chunk, length)
        if key not in self._packings:
            corpus = self._corpora[source]
            self._packings[key] = best_fit(corpus.documents(chunk).starts, corpus.tokens_in(chunk), length)
            if len(self._packings) > _PACKED_CHUNKS:
                self._packings.popitem(last=False)
        self._packings.move_to_end(key)
        return self._packings[key]
