"""The configuration group `data`: what is read, in which order, and how it becomes sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from pretrain.config.checks import check_at_most, check_positive
from pretrain.errors import ConfigError

MAX_SEQUENCE_LENGTH = 1 << 24
MAX_BATCH_SEQUENCES = 1 << 20
MAX_LANES = 1 << 20


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One named, weighted corpus of a mixture."""

    name: str = MISSING
    """Name used in stages, metrics and reports."""
    manifest: str = MISSING
    """Path or URL of the corpus's manifest.json."""
    weight: float = 1.0
    """Share of the samples, relative to the other sources' weights."""
    max_epochs: int | None = None
    """Once it has been read so often, the source is not drawn any more, and the others take its share; null: no end."""


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """From a point of the run on, another mixture, sequence length or batch; what is null stays as it was."""

    start_tokens: int = MISSING
    """First token of the stage, counted over the whole run; it begins with the first step at or after it."""
    weights: dict[str, float] | None = None
    """Weight of every source by name; a source that is not named gets 0."""
    sequence_length: int | None = None
    """Tokens per sequence: a multiple of the stage's before, which divides the corpora's chunks."""
    global_batch_sequences: int | None = None
    """Sequences per optimizer update."""


class Packing(Enum):
    concat = "concat"  # documents one after another, cut where a sequence is full
    best_fit = "best_fit"  # the documents of a chunk placed so that few are cut; no padding, nothing left out


class BadChunk(Enum):
    stop = "stop"  # the run ends, naming the file
    substitute = "substitute"  # another chunk of the source is read in its place, and recorded


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """What is read, and in which order."""

    manifest: str | None = None
    """Path or URL (s3://bucket/corpus/manifest.json) of one corpus's manifest.json. Give this or `sources`."""
    sources: list[SourceConfig] = field(default_factory=list)
    """A mixture of corpora."""
    stages: list[StageConfig] = field(default_factory=list)
    """Changes of the mixture weights during the run."""
    sequence_length: int = 1024
    """T: tokens per sequence; divides the corpus's chunk size."""
    lanes: int | None = None
    """V: virtual lanes of the sample order, fixed for the run; null: chosen from the corpus and the batch."""
    window_chunks: int = 32
    """W: chunks that are shuffled together within a lane."""
    document_masking: bool = True
    """Tokens attend within their own document only; false: across the whole sequence."""
    loader_workers: int = 1
    """Processes per rank that read and batch; 0: in the training process."""
    prefetch_batches: int = 4
    """Micro batches that each worker keeps ready."""
    verify_chunks: bool = True
    """Check the hash of each chunk at its first use; those behind a URL always are."""
    read_timeout_s: float = 300
    """Behind a URL: training waits so long for a store that is away; one attempt gets a tenth of it."""
    cache_dir: str | None = None
    """Chunks from URLs are kept here, for all processes of a node; null: $XDG_CACHE_HOME, else the temporary folder."""
    cache_gib: float = 16
    """Most that all files there take."""
    prefetch_chunks: int = 8
    """Chunks that each process fetches ahead at a time, from a URL."""
    packing: Packing = Packing.concat
    """How documents become sequences; best_fit needs document_masking."""
    on_bad_chunk: BadChunk = BadChunk.stop
    """What happens where a chunk cannot be read, or is not what its hash says, after all retries."""

    def __post_init__(self) -> None:
        positive = "sequence_length window_chunks prefetch_batches prefetch_chunks read_timeout_s cache_gib"
        check_positive(self, "data", *positive.split())
        check_at_most(self, "data", {"sequence_length": MAX_SEQUENCE_LENGTH, "lanes": MAX_LANES})
        if self.lanes is not None:
            check_positive(self, "data", "lanes")
        if self.loader_workers < 0:
            raise ConfigError(f"data.loader_workers={self.loader_workers} is negative; allowed: 0 or more")
        if self.manifest is not None and self.sources:
            raise ConfigError("data.manifest and data.sources are both given; give one corpus or a mixture")
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ConfigError(f"data.sources has two sources of the same name: {sorted(names)}")
        for source in self.sources:
            if not (math.isfinite(source.weight) and source.weight >= 0):
                raise ConfigError(f"data.sources: weight={source.weight} of {source.name!r} is not 0 or more")
            if source.max_epochs is not None:
                check_positive(source, "data.sources", "max_epochs")
        if self.sources and not sum(source.weight for source in self.sources) > 0 and not self.stages:
            raise ConfigError("data.sources: all weights are 0; give at least one source a positive weight")
        self._check_stages(names or ["corpus"])
        if self.packing is Packing.best_fit and not self.document_masking:
            raise ConfigError(
                "data.packing=best_fit needs data.document_masking=true, since a sequence then holds documents that "
                "do not follow each other"
            )

    def _check_stages(self, names: list[str]) -> None:
        starts = [stage.start_tokens for stage in self.stages]
        if any(start <= 0 for start in starts) or sorted(set(starts)) != starts:
            raise ConfigError(f"data.stages: start_tokens={starts} must be positive and increasing")
        length = self.sequence_length
        for stage in self.stages:
            self._check_weights(stage.weights, names)
            if stage.sequence_length is not None and (
                stage.sequence_length < length or stage.sequence_length % length
            ):
                raise ConfigError(
                    f"data.stages: sequence_length={stage.sequence_length} must be a multiple of the {length} "
                    "before it, so that no token is lost"
                )
            length = stage.sequence_length or length
            if stage.global_batch_sequences is not None:
                check_positive(stage, "data.stages", "global_batch_sequences")
                check_at_most(stage, "data.stages", {"global_batch_sequences": MAX_BATCH_SEQUENCES})

    def _check_weights(self, weights: dict[str, float] | None, names: list[str]) -> None:
        if weights is None:
            return
        unknown = sorted(set(weights) - set(names))
        if unknown:
            raise ConfigError(f"data.stages: weights name unknown sources {unknown}; known: {names}")
        if min(weights.values(), default=0) < 0 or not sum(weights.values()) > 0:
            raise ConfigError(f"data.stages: weights={dict(weights)} must be 0 or more with a positive sum")

    def corpora(self) -> list[SourceConfig]:
        """The sources of the run: the mixture, or the one corpus under the name `corpus`."""
        if self.manifest is not None:
            return [SourceConfig(name="corpus", manifest=self.manifest)]
        return list(self.sources)
