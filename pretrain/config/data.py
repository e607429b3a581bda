"""The configuration group `data`: what is read, in which order, and how it is cut into sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from pretrain.config.checks import check_at_most, check_positive
from pretrain.config.texts import ManifestText, PathText
from pretrain.errors import ConfigError

MAX_SEQUENCE_LENGTH = 1 << 24
MAX_BATCH_SEQUENCES = 1 << 20
MAX_LANES = 1 << 20


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One named, weighted corpus of a mixture."""

    name: str = MISSING
    """Name used in stages, metrics and reports."""
    manifest: ManifestText = MISSING
    """Path or URL of the corpus's manifest.json."""
    weight: float = 1.0
    """Share of the samples, relative to the other sources' weights."""
    max_epochs: int | None = None
    """Number of passes over this source. After them it is no longer drawn, and the other sources take over its share;
    null means no limit."""


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """A change of the mixture, the sequence length or the batch size during the run; a null value changes nothing."""

    start_tokens: int = MISSING
    """Position in tokens, counted over the whole run, from which the stage applies. It takes effect at the first
    optimizer step that starts at or after this position."""
    weights: dict[str, float] | None = None
    """Weight of each source by name. A source that is not listed gets weight 0."""
    sequence_length: int | None = None
    """Tokens per sequence: a multiple of the previous stage's value that divides the chunk size of every corpus."""
    global_batch_sequences: int | None = None
    """Sequences per optimizer update, over all ranks."""


class Packing(Enum):
    """How the documents of a chunk are arranged in sequences."""

    concat = "concat"  # documents follow each other and are cut where a sequence is full
    best_fit = "best_fit"  # documents are arranged so that few are cut; no padding, and no token is dropped


class BadChunk(Enum):
    """What to do about a chunk that cannot be read or fails its hash."""

    stop = "stop"  # end the run with an error that names the file
    substitute = "substitute"  # read another chunk of the same source instead, and record the substitution


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """What is read, and in which order."""

    manifest: ManifestText | None = None
    """Path or URL (such as s3://bucket/corpus/manifest.json) of one corpus's manifest.json. Give this or `sources`."""
    sources: list[SourceConfig] = field(default_factory=list)
    """The corpora of a mixture, with their weights."""
    stages: list[StageConfig] = field(default_factory=list)
    """Changes of the mixture, the sequence length or the batch size during the run, in order of start_tokens."""
    sequence_length: int = 1024
    """T: tokens per sequence. It must divide the chunk size of every corpus."""
    lanes: int | None = None
    """V: number of virtual lanes of the sample order, fixed for the run; null derives it from the corpus and the
    batch."""
    window_chunks: int = 32
    """W: number of chunks whose sequences are shuffled together within a lane."""
    document_masking: bool = True
    """Tokens attend only within their own document; false lets them attend across the whole sequence."""
    loader_workers: int = 1
    """Number of processes per rank that read and batch data; 0 does it in the training process."""
    prefetch_batches: int = 4
    """Number of micro-batches that each worker keeps ready."""
    verify_chunks: bool = True
    """Check the hash of each chunk the first time it is used. Chunks from a URL are always checked."""
    read_timeout_s: float = 300
    """Seconds that training waits for an unreachable object store; a single attempt gets a tenth of this time."""
    cache_dir: PathText | None = None
    """Folder that caches chunks from URLs, shared by all processes of a node; null uses $XDG_CACHE_HOME, or the
    temporary folder where that is not set."""
    cache_gib: float = 16
    """Upper limit of the total size of the cached files, in GiB."""
    prefetch_chunks: int = 8
    """Number of chunks that each process downloads ahead of use, where the corpus is at a URL."""
    packing: Packing = Packing.concat
    """How documents are arranged in sequences; best_fit requires document_masking=true."""
    on_bad_chunk: BadChunk = BadChunk.stop
    """What to do about a chunk that still cannot be read, or does not match its hash, after all retries."""

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
                "data.packing=best_fit needs data.document_masking=true, because its sequences hold unrelated documents"
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
                    f"data.stages: sequence_length={stage.sequence_length} must be a multiple of the previous stage's "
                    f"{length}, so that no token is lost"
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
        """The sources of the run: those of the mixture, or the only corpus, which gets the name `corpus`."""
        if self.manifest is not None:
            return [SourceConfig(name="corpus", manifest=self.manifest)]
        return list(self.sources)
