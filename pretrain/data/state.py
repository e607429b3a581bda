"""The data state in a checkpoint: which order of samples the run follows, and its position in that order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pretrain.config.data import MAX_LANES
from pretrain.config.data_stages import MAX_SAMPLES, DataStage
from pretrain.data.mixture import quotas
from pretrain.errors import ConfigError
from pretrain.stored import Annotated, Ge, Le, MaxLen, MinLen, Sha256, Text, parse

STATE_SCHEMA = 2
MAX_TABLE_ROWS = 1 << 24
"""Upper limit of stages x lanes x sources, because the order keeps 40 bytes for each combination."""
MAX_SOURCES = 1 << 16
"""Upper limit of the number of sources in a mixture."""

Sample = Annotated[int, Ge(0), Le(MAX_SAMPLES)]
Chunk = Annotated[int, Ge(0), Le(1 << 32)]
SourceNumber = Annotated[int, Ge(0), Le(MAX_SOURCES)]


@dataclass(kw_only=True, slots=True)
class Substitution:
    """A chunk that could not be read, and what was read in its place."""

    source: SourceNumber
    """Number of the source in the mixture."""
    epoch: Annotated[int, Ge(0), Le(MAX_SAMPLES)]
    """Epoch of the source, counted from 0. The substitution applies only in this epoch."""
    chunk: Chunk
    """The chunk that could not be read."""
    first_sample: Sample
    """First sample to which the substitution applies: the first one of a step. Earlier samples were read from the chunk
    itself, or from an earlier substitute that has become unreadable too."""
    substitute: Chunk
    """The chunk that is read instead."""
    reason: Text
    """What was wrong with the chunk, in one sentence."""


def chunk_read(made: Sequence[Substitution], chunk: int, sample: int) -> int:
    """The chunk that a sample is read from. `made` are the substitutions of `chunk` in one epoch, oldest first."""
    return next((s.substitute for s in reversed(made) if sample >= s.first_sample), chunk)


@dataclass(kw_only=True, slots=True)
class OrderState:
    """Which order a run follows, and its position in that order. It is the same on every rank."""

    schema: int = STATE_SCHEMA
    """Version of these fields."""
    manifest_sha: Annotated[list[Sha256], MinLen(1), MaxLen(MAX_SOURCES)]
    """Root hash of each source's manifest, in the order of the sources."""
    seed: Annotated[int, Ge(-(1 << 63)), Le((1 << 64) - 1)]
    """The run's seed, which is part of the key of every permutation."""
    stages: Annotated[list[DataStage], MinLen(1), MaxLen(1 << 10)]
    """The data stages, in the order of their first samples."""
    consumed_samples: Sample
    """The sample after the last one of the last completed optimizer step."""
    lanes: Annotated[int, Ge(1), Le(MAX_LANES)]
    """V: number of lanes, fixed for the whole run."""
    chunk_tokens: list[Annotated[int, Ge(1), Le(1 << 40)]]
    """Number of tokens in a full chunk of each source."""
    window_chunks: Annotated[int, Ge(1), Le(1 << 32)]
    """W: number of chunks of a lane that are shuffled together."""
    packing: Annotated[str, MaxLen(64)]
    """How documents are cut into sequences: `concat` or `best_fit`."""
    passed_over: list[Annotated[list[Sample], MinLen(2), MaxLen(2)]] = field(default_factory=list)
    """Ranges [first, end) of sample indices that rollbacks skipped, in the order of the rollbacks."""
    substitutions: list[Substitution] = field(default_factory=list)
    """Chunks that could not be read, each with the chunk that is read in its place, in the order of their samples."""

    @property
    def fixed_samples(self) -> int:
        """Index of the first sample that may still change; all samples before it have been read or skipped."""
        return max([self.consumed_samples, *(end for _, end in self.passed_over)])

    @property
    def begun(self) -> list[DataStage]:
        """The stages that have begun and can therefore no longer change."""
        return [stage for stage in self.stages if stage.first_sample < self.fixed_samples]

    def to_dict(self) -> dict[str, Any]:
        """The state as plain JSON values."""
        return asdict(self) | {"stages": [stage.to_dict() for stage in self.stages]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OrderState:
        """The inverse of `to_dict`. Raises ConfigError if the values are invalid or have another schema version."""
        if values.get("schema") != STATE_SCHEMA:
            raise ConfigError(
                f"the checkpoint's order of samples has schema {values.get('schema')!r}, this version reads schema "
                f"{STATE_SCHEMA}; resume with the version that wrote it"
            )
        where = "the order in a checkpoint"
        state = parse(cls, json.dumps(values), where, "an order of samples")
        state._check(where)
        return state

    def _check(self, where: str) -> None:
        """Raise ConfigError if the values contradict each other."""
        n_sources = len(self.manifest_sha)
        widths = {len(stage.weights) for stage in self.stages} | {len(self.chunk_tokens)}
        firsts = [stage.first_sample for stage in self.stages]
        if widths != {n_sources} or firsts[0] != 0 or firsts != sorted(firsts):
            raise ConfigError(f"{where} contradicts itself in its sources or in where its stages begin")
        if any((stage.closes_epochs is None) != (stage.end_sample is None) for stage in self.stages):
            raise ConfigError(f"{where} contradicts itself in how a stage ends")
        if len(self.stages) * self.lanes * n_sources > MAX_TABLE_ROWS:
            raise ConfigError(
                f"{where} has {len(self.stages)} stages, {self.lanes} lanes and {n_sources} sources; their product may "
                f"be {MAX_TABLE_ROWS:,} at most"
            )
        if any(first > end for first, end in self.passed_over):
            raise ConfigError(f"{where} passes over samples that end before they begin")
        if any(substitution.source >= n_sources for substitution in self.substitutions):
            raise ConfigError(f"{where} names a source that it does not have")

    def check_compatible(self, other: OrderState) -> None:
        """Raise ConfigError unless the configured order, `other`, continues this saved one.

        `other.stages` are the stages of a new run with the configuration. Only parts that have not been read yet may
        change: stages that have not begun, the batch size, and sources at the end of the list that had no weight in
        any stage so far.
        """
        differences = [
            f"{key}={new} was {old}"
            for key, old, new in [
                ("seed", self.seed, other.seed),
                ("data.lanes", self.lanes, other.lanes),
                ("data.window_chunks", self.window_chunks, other.window_chunks),
                ("data.packing", self.packing, other.packing),
            ]
            if old != new
        ]
        differences += self._corpus_differences(other)
        wanted = {stage.start_tokens: _content(stage) for stage in other.stages}
        for stage in self.begun:
            if stage.start_tokens is not None and wanted.get(stage.start_tokens) != _content(stage):
                there = wanted.get(stage.start_tokens)
                differences.append(
                    f"the stage that began after {stage.start_tokens} tokens is "
                    f"{'gone' if there is None else _words(there)}, was {_words(_content(stage))}"
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


def _content(stage: DataStage) -> tuple[int, list[int]]:
    """What determines the samples of a stage: its sequence length and its quotas, without trailing zeros."""
    counts = quotas(stage.weights)
    while counts[-1] == 0:
        counts.pop()
    return stage.sequence_length, counts


def _words(content: tuple[int, list[int]]) -> str:
    length, counts = content
    return f"sequences of {length} tokens with shares {[round(count / (1 << 16), 4) for count in counts]}"
