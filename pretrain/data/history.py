"""What a run has read: which documents each of its steps held, and at which steps a document was read.

Answers are computed from the order state in a checkpoint and the corpora, because the order of samples is a function
of these. So nothing has to be logged, and the time to find a step does not grow with the run. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.checkpoint.folder import newest_state
from pretrain.config import DataConfig, stored_config
from pretrain.config.data_stages import Steps
from pretrain.corpus.ids import chunks_of
from pretrain.corpus.shards import Corpus
from pretrain.data.lanes import rank_samples
from pretrain.data.order import Order, SourceSize
from pretrain.data.packing import best_fit, ranges_of
from pretrain.data.state import OrderState, chunk_read
from pretrain.errors import ConfigError
from pretrain.remote import ReadOptions, is_url, redact


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A part of a document in a sequence."""

    corpus: str
    """Name of the source in the run's mixture."""
    source: str
    """Name that the corpus has for the source of the document."""
    document: str
    """The id of the document."""
    first_token: int
    """Offset of the piece's first token in the document; the document's bos has offset 0."""
    n_tokens: int
    """Number of tokens in the piece."""
    chunk: int
    """Number of the chunk in its corpus."""
    start: int
    """Offset of the piece's first token in the chunk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceRead:
    """One sequence of a step."""

    sample: int
    """Index of the sample in the order."""
    epoch: int
    """Epoch of its source, counted from 0."""
    pieces: list[Piece]
    """The pieces of documents that make up the sequence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentRead:
    """One reading of a piece of a document."""

    step: int | None
    """Number of the step that read the piece; None if a rollback skipped its sample."""
    sample: int
    """Index of the sample in the order."""
    epoch: int
    """Epoch of the source, counted from 0."""
    piece: Piece
    """The piece that was read."""


class ReadHistory:
    """What a run had read after `step` steps, according to the order state after that step.

    Raises ConfigError if a corpus is missing or is not the one that the run has read.
    """

    def __init__(
        self, data: DataConfig, state: OrderState, step: int, world_size: int, sequence_ranks: int = 1
    ) -> None:
        """`sequence_ranks` is the number of neighboring ranks that share each sequence."""
        self.step, self.world_size, self._sequence_ranks = step, world_size, sequence_ranks
        self._state, self._data = state, data
        self.names = [source.name for source in data.corpora()]
        # The default cache folder is used, not the one that the run names, because the run may be someone else's.
        self.corpora = [
            Corpus(source.manifest, data.verify_chunks, options=ReadOptions()) for source in data.corpora()
        ]
        found = [corpus.manifest.root_sha256 for corpus in self.corpora]
        for name, now, then in zip(self.names, found, state.manifest_sha, strict=False):
            if now != then:
                raise ConfigError(
                    f"the corpus of {name!r} has root hash {now}, the run has read {then}; put that corpus back"
                )
        sizes = [SourceSize.of(corpus.manifest) for corpus in self.corpora]
        self._order = Order(
            sizes, state.stages, lanes=state.lanes, window_chunks=state.window_chunks, seed=state.seed
        )
        self._steps = Steps(state.stages, state.passed_over)

    @classmethod
    def of_run(
        cls, run_dir: Path, manifests: Sequence[str] = (), target: str | None = None
    ) -> tuple[ReadHistory, str]:
        """The history up to the newest checkpoint of a run, and the sha256 of the run's tokenizer.

        `manifests` are the paths or URLs of the corpora's manifests, in the order of the run's sources, and `target` is
        the location of the checkpoints. Both are required if they are at URLs, because a URL that only a file names is
        not opened. Raises ConfigError if a required one is not given, or if there is no checkpoint.
        """
        state = newest_state(run_dir, target)
        config = stored_config(state["config"], f"the newest checkpoint of {run_dir}")
        data = _with_manifests(config.data, manifests)
        order, shared_by = OrderState.from_dict(state["order"]), config.engine.sequence_parallel_ranks
        history = cls(data, order, state["step"], state["world_size"], shared_by)
        return history, state["tokenizer_sha256"]

    def read_in(
        self, step: int, rank: int | None = None, world_size: int | None = None
    ) -> list[SequenceRead]:
        """The sequences of a step, or those of one of `world_size` ranks, in the order in which it reads them.

        Raises ConfigError for a step that the run has not completed, and CorruptShardError.
        """
        if not 1 <= step <= self.step:
            raise ConfigError(f"step={step} is not among the steps 1 to {self.step} of the newest checkpoint")
        taken = self._steps[step]
        samples = np.arange(taken.first_sample, taken.end_sample)
        if rank is not None:
            n_ranks = world_size or self.world_size
            readers, rest = divmod(n_ranks, self._sequence_ranks)
            n_sequences = taken.padded_end - taken.first_sample
            if not 0 <= rank < n_ranks or rest or n_sequences % readers:
                raise ConfigError(
                    f"rank={rank} does not exist where {n_sequences} sequences are split over {n_ranks} ranks"
                    + (f", {self._sequence_ranks} to each" if self._sequence_ranks > 1 else "")
                )
            samples = rank_samples(
                taken.first_sample,
                n_sequences,
                lanes=self._state.lanes,
                rank=rank // self._sequence_ranks,
                world_size=readers,
            )
            samples = samples[samples < taken.end_sample]
        where = self._order.locate(samples)
        found = []
        for row, sample in enumerate(samples.tolist()):
            mine = np.flatnonzero(where.request == row)
            pieces = []
            for source, epoch, chunk, sequence, length, _ in zip(
                *(values[mine].tolist() for values in where), strict=True
            ):
                chunk = self._read_chunk(source, epoch, chunk, sample)
                pieces += self._pieces(source, chunk, self._segments(source, chunk, sequence, length))
            found.append(SequenceRead(sample=sample, epoch=int(where.epoch[mine[0]]), pieces=pieces))
        return found

    def reads_of(self, document: str) -> list[DocumentRead]:
        """Every reading of a document, or of all documents with this id, in the order of the samples.

        Raises ConfigError if no corpus has such a document, and the errors of `chunks_of` and `Corpus.documents`.
        """
        end = self._steps[self.step].end_sample
        found: list[DocumentRead] = []
        exists = False
        for source, corpus in enumerate(self.corpora):
            for chunk in chunks_of(corpus, document):
                exists = True
                for sample, epoch, segments in self._readings(source, chunk, end):
                    found += [
                        DocumentRead(
                            step=self._steps.step_of(sample), sample=sample, epoch=epoch, piece=piece
                        )
                        for piece in self._pieces(source, chunk, segments)
                        if piece.document == document
                    ]
        if not exists:
            raise ConfigError(
                f"document={document} is in none of the run's corpora ({', '.join(self.names)})"
            )
        return sorted(found, key=lambda read: (read.sample, read.piece.chunk, read.piece.start))

    def text(self, piece: Piece, tokenizer: Any) -> str:
        """The text of a piece, decoded with the run's tokenizer. Raises the errors of `Corpus.read`."""
        corpus = self.corpora[self.names.index(piece.corpus)]
        return tokenizer.decode(corpus.read(piece.chunk, piece.start, piece.start + piece.n_tokens).tolist())

    def _readings(self, source: int, chunk: int, end: int) -> list[tuple[int, int, list[tuple[int, int]]]]:
        """(sample, epoch, segments) of all sequences read from a chunk, including those where it was a substitute."""
        substituted = self._state.substitutions
        stood_in = {s.chunk for s in substituted if (s.source, s.substitute) == (source, chunk)}
        readings = []
        for asked in sorted(stood_in | {chunk}):
            there = self._order.find(source, asked, end)
            for sample, sequence, epoch, length in zip(*(values.tolist() for values in there), strict=True):
                if self._read_chunk(source, epoch, asked, sample) == chunk:
                    readings.append((sample, epoch, self._segments(source, chunk, sequence, length)))
        return readings

    def _read_chunk(self, source: int, epoch: int, chunk: int, sample: int) -> int:
        """The chunk that was actually read where the order says `chunk`."""

        made = [
            s for s in self._state.substitutions if (s.source, s.epoch, s.chunk) == (source, epoch, chunk)
        ]
        return chunk_read(made, chunk, sample)

    def _segments(self, source: int, chunk: int, sequence: int, length: int) -> list[tuple[int, int]]:
        corpus = self.corpora[source]
        if self._state.packing == "concat" or corpus.manifest.packed is not None:
            return ranges_of(corpus, chunk, length, sequence)
        return best_fit(corpus.documents(chunk).starts, corpus.tokens_in(chunk), length)[sequence]

    def _pieces(self, source: int, chunk: int, segments: list[tuple[int, int]]) -> list[Piece]:
        corpus = self.corpora[source]
        documents = corpus.documents(chunk)
        pieces = []
        for start, stop in segments:
            first = int(documents.starts.searchsorted(start, side="right")) - 1
            last = int(documents.starts.searchsorted(stop, side="left"))
            for i in range(first, last):
                low, high = max(start, int(documents.starts[i])), min(stop, int(documents.ends[i]))
                pieces.append(
                    Piece(
                        corpus=self.names[source],
                        source=corpus.manifest.sources[int(documents.source[i])].name,
                        document=documents.ids[i],
                        first_token=int(documents.offsets[i]) + low - int(documents.starts[i]),
                        n_tokens=high - low,
                        chunk=chunk,
                        start=low,
                    )
                )
        return pieces


def _with_manifests(data: DataConfig, manifests: Sequence[str]) -> DataConfig:
    """The run's data with the manifests from the command line, if any. Raises ConfigError if one is missing."""
    sources = data.corpora()
    if manifests:
        if len(manifests) != len(sources):
            names = ", ".join(source.name for source in sources)
            raise ConfigError(
                f"manifests={list(manifests)} names {len(manifests)} corpora, where the run has read {len(sources)}: "
                f"{names}; name all of them, in this order"
            )
        named = [replace(source, manifest=given) for source, given in zip(sources, manifests, strict=True)]
        return replace(data, manifest=None, sources=named, stages=[])
    for source in sources:
        if is_url(source.manifest):
            raise ConfigError(
                f"the run has read the corpus {source.name!r} from {redact(source.manifest)!r}, and a URL that a run "
                "folder names is not opened by itself; name it on the command line: manifests=[URL,...]"
            )
    return data
