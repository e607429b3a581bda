"""The batches of one rank: `order.py` determines the next samples, and `corpus/shards.py` reads them.

The only state that changes with each step is one integer, the number of samples consumed. It follows from the number
of completed steps, so samples that workers have only read ahead never count. The rest of `OrderState` identifies the
order and the corpora that this integer refers to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from pretrain.batch import Batch
from pretrain.config import BadChunk, DataConfig, SourceConfig
from pretrain.config.data_stages import Step, Steps, micro_batch_of, n_steps_of, plan_stages
from pretrain.corpus.manifest import Manifest
from pretrain.corpus.shards import Corpus
from pretrain.data.inputs import check_lengths, check_packed
from pretrain.data.lanes import (
    choose_lanes,
    end_sources,
    end_with_epoch,
    rank_samples,
    steps_until_epoch,
    weighted_by_size,
)
from pretrain.data.masking import Masking
from pretrain.data.order import Location, Order, SourceSize
from pretrain.data.permutation import Ints
from pretrain.data.sequences import SequenceReader, Sequences
from pretrain.data.state import OrderState, Substitution
from pretrain.data.workers import MicroBatches, read_ahead
from pretrain.device import device_type
from pretrain.errors import ConfigError
from pretrain.remote import ReadOptions

Exchange = Callable[[list[Substitution]], list[Substitution]]
_STEPS_AHEAD = 16
"""Number of steps by which chunks at a URL are requested before they are read. A window needs all its
chunks from its first step on."""


def build_batch(
    corpus: Corpus,
    chunk: Ints,
    sequence: Ints,
    sequence_length: int,
    document_masking: bool,
    masking: Masking | None = None,
) -> Batch:
    """Sequences of one corpus, cut every `sequence_length` tokens of a chunk.

    A sequence that the chunk does not fill is padded with the corpus's eos. With `masking`, the number of a sequence in
    the corpus decides which of its tokens are hidden. Raises CorruptShardError.
    """
    rows, per_chunk = np.arange(len(chunk)), -(-corpus.chunk_tokens // sequence_length)
    samples = chunk * per_chunk + sequence
    zeros = np.zeros_like(chunk)
    where = Location(zeros, zeros, chunk, sequence, np.full_like(chunk, sequence_length), rows)
    reader = SequenceReader([corpus], DataConfig(document_masking=document_masking), masking=masking)
    return _to_batch(reader.read(where, samples, sequence_length), samples)


def _to_batch(read: Sequences, samples: Ints) -> Batch:
    """The tensors of a batch. With a GPU they are page-locked, so that they can be copied in the background."""
    tensor = torch.empty(read.packed.shape, dtype=torch.int64, pin_memory=device_type() == "cuda")
    tokens, labels, positions, document_ids = tensor.copy_(torch.from_numpy(read.packed)).unbind(0)
    return Batch(tokens, labels, positions, document_ids, samples, read.counts)


class TrainLoader:
    """The training batches of one rank.

    `state` is the order state of a checkpoint, or None for a new run. `manifests` are the ones that the caller has
    already read, by their path or URL in `data`; the others are read here. `masking` hides tokens, for the objective
    mlm. Raises ConfigError where the configuration, the corpora and the state do not fit together.
    """

    def __init__(
        self,
        data: DataConfig,
        seed: int,
        *,
        global_batch_sequences: int,
        micro_batch_sequences: int,
        rank: int,
        world_size: int,
        total_steps: int | None = None,
        total_tokens: int | None = None,
        total_epochs: int | None = None,
        state: OrderState | None,
        manifests: Mapping[str, Manifest] | None = None,
        masking: Masking | None = None,
    ) -> None:
        sources = data.corpora()
        options, read = ReadOptions.of(data), manifests or {}
        corpora = [
            Corpus(s.manifest, data.verify_chunks, options=options, manifest=read.get(s.manifest))
            for s in sources
        ]
        _check_corpora(sources, corpora, data)
        self._sizes = [SourceSize.of(corpus.manifest) for corpus in corpora]
        if total_epochs is not None:
            data = weighted_by_size(data, self._sizes)
        lanes = data.lanes or (state.lanes if state else choose_lanes(self._sizes, global_batch_sequences))
        self.state = OrderState(
            manifest_sha=[corpus.manifest.root_sha256 for corpus in corpora],
            seed=seed,
            stages=plan_stages(data, global_batch_sequences),
            consumed_samples=0,
            lanes=lanes,
            chunk_tokens=[corpus.chunk_tokens for corpus in corpora],
            window_chunks=data.window_chunks,
            packing=data.packing.name,
        )
        if state is not None:
            state.check_compatible(self.state)
            self.state.consumed_samples = state.consumed_samples
            self.state.passed_over = state.passed_over
            self.state.substitutions = state.substitutions
            self.state.stages = plan_stages(data, global_batch_sequences, state.begun, state.fixed_samples)
        self._data, self._corpora, self._masking = data, corpora, masking
        self.names = [source.name for source in sources]
        self._total_epochs = total_epochs
        self.n_steps = n_steps_of(self.state.stages, total_steps, total_tokens) if total_epochs is None else 0
        """Optimizer updates of the whole run. With `total_epochs`, a rollback makes them fewer: it skips samples."""
        self._max_epochs = [source.max_epochs for source in sources]
        self._rank, self._world_size = rank, world_size
        self.set_micro_batch(micro_batch_sequences)
        self._plan()
        first = corpora[0].manifest
        self.tokenizer_sha256, self.vocab_size = first.tokenizer_sha256, first.vocab_size
        self.bos_id, self.eos_id = first.bos_id, first.eos_id

    def set_micro_batch(self, sequences: int) -> None:
        """Change the size of the forward passes from the next call of `steps` on. This does not change the order."""
        self._micro_batch_tokens = sequences * self._data.sequence_length

    def _plan(self) -> None:
        state = self.state
        order = Order(
            self._sizes,
            state.stages,
            lanes=state.lanes,
            window_chunks=state.window_chunks,
            seed=state.seed,
        )
        if self._total_epochs is not None:
            state.stages = end_with_epoch(order, self._sizes, self._total_epochs, state.fixed_samples)
        else:
            end = Steps(state.stages, state.passed_over)[self.n_steps].end_sample
            state.stages = end_sources(order, self._max_epochs, state.fixed_samples, end)
        if state.stages is not order.stages:
            order = order.with_stages(state.stages)
        _check_ends(order)
        self.order, self.plan = order, Steps(state.stages, state.passed_over)
        if self._total_epochs is not None:
            self.n_steps = steps_until_epoch(state.stages, state.passed_over, self._total_epochs)

    def state_at(self, step: int) -> OrderState:
        """The order state that a checkpoint after this step holds."""
        return replace(self.state, consumed_samples=self.plan[step].end_sample)

    def epochs(self, step: int) -> dict[str, float]:
        """Number of times that each source has been read by the end of a step, by source name."""
        return dict(zip(self.names, self.order.epochs(self.plan[step].end_sample), strict=True))

    def pass_over(self, step: int, n_steps: int) -> list[int]:
        """Skip the samples of `n_steps` steps, starting with `step`, which is not completed.

        Returns the [first, end) of these samples.
        """
        left_out = [self.plan[step].first_sample, self.plan.end_after(step, n_steps, self.state.stages)]
        self.state.passed_over = [*self.state.passed_over, left_out]
        self._plan()
        return left_out

    def steps(self, first_step: int, exchange: Exchange = list) -> Iterator[list[Batch]]:
        """The micro batches of each optimizer step, from step `first_step` to the last step of the run.

        The iterator owns its worker processes, which end with it; to start at another step, call this again. Where
        `data.on_bad_chunk` substitutes bad chunks, `exchange` is called for each step with the substitutions that this
        rank proposes, and returns those of all ranks, in the order of the ranks. If there are any, they become part of
        `state`, from the first sample of the step on, and all ranks read the step again. Raises CorruptShardError, and
        RunError if a worker process dies.
        """
        number = first_step
        while number <= self.n_steps:
            for found in self._read_steps(number):
                if self._data.on_bad_chunk is BadChunk.substitute and (
                    proposed := exchange([entry for read, _ in found for entry in read.proposed])
                ):
                    self._substitute(proposed, self.plan[number].first_sample)
                    break
                yield [_to_batch(read, samples) for read, samples in found]
                number += 1

    def _substitute(self, proposed: Sequence[Substitution], first_sample: int) -> None:
        """Add the first proposal for each chunk to the state. All ranks make the same call."""
        chosen: dict[tuple[int, int, int], Substitution] = {}
        for entry in proposed:
            chosen.setdefault((entry.source, entry.epoch, entry.chunk), entry)
        new = [replace(chosen[key], first_sample=first_sample) for key in sorted(chosen)]
        self.state.substitutions = [*self.state.substitutions, *new]

    def _read_steps(self, first_step: int) -> Iterator[list[tuple[Sequences, Ints]]]:
        """What has been read for each micro batch of each step, and its samples."""
        reader = SequenceReader(
            self._corpora, self._data, self.state.seed, self.state.substitutions, self._masking
        )
        read, wanted = MicroBatches(reader, self.order), self._micro_batches(first_step)
        n_workers = self._data.loader_workers
        found = (
            read_ahead(read, wanted, n_workers, self._data.prefetch_batches)
            if n_workers
            else map(read, wanted)
        )
        for number in range(first_step, self.n_steps + 1):
            yield [next(found) for _ in self._micro_batches_of(self.plan[number])]

    def _micro_batches(self, first_step: int) -> Iterator[tuple[Ints, Ints]]:
        """For each forward pass, its samples and the samples whose chunks should be requested now."""
        is_behind_url = any(corpus.is_behind_url for corpus in self._corpora)
        nothing = np.empty(0, np.int64)
        for number in range(first_step, self.n_steps + 1):
            ahead = (
                [number + _STEPS_AHEAD] if number > first_step else range(number, number + _STEPS_AHEAD + 1)
            )
            wanted = [n for n in ahead if is_behind_url and n <= self.n_steps]
            upcoming = [samples for n in wanted for samples in self._micro_batches_of(self.plan[n])]
            for samples in self._micro_batches_of(self.plan[number]):
                yield samples, np.concatenate(upcoming) if upcoming else nothing
                upcoming = []

    def _micro_batches_of(self, step: Step) -> list[Ints]:
        """The samples of each forward pass of this rank in a step."""
        count = step.padded_end - step.first_sample
        mine = rank_samples(
            step.first_sample, count, lanes=self.state.lanes, rank=self._rank, world_size=self._world_size
        )
        size = micro_batch_of(count, step.sequence_length, self._world_size, self._micro_batch_tokens)
        return list(mine.reshape(-1, size))


def _check_ends(order: Order) -> None:
    """Raise ConfigError unless the stages that close epochs end where the order says, since a file may have them."""
    for at, stage in enumerate(order.stages):
        if stage.closes_epochs is not None and stage.end_sample != stage.first_sample + order.samples_left(
            at
        ):
            raise ConfigError(
                f"the order in a checkpoint closes epoch {stage.closes_epochs} at sample {stage.end_sample}, which is "
                "not where its sources end; the checkpoint is damaged, resume from another"
            )


def _check_corpora(sources: list[SourceConfig], corpora: list[Corpus], data: DataConfig) -> None:
    """Raise ConfigError unless all corpora have one tokenizer and chunks that the sequence lengths divide."""
    first = corpora[0].manifest
    lengths = [data.sequence_length, *(s.sequence_length for s in data.stages if s.sequence_length)]
    for source, corpus in zip(sources, corpora, strict=True):
        for name in ("tokenizer_sha256", "vocab_size", "bos_id", "eos_id"):
            here, there = getattr(corpus.manifest, name), getattr(first, name)
            if here != there:
                raise ConfigError(
                    f"data.sources: {source.name!r} has {name} {here}, {sources[0].name!r} has {there}; "
                    "prepare all sources of a run with the same tokenizer"
                )
        check_lengths(lengths, corpus.chunk_tokens, source.manifest)
        check_packed(lengths, corpus.manifest, source.manifest)
