"""The batches of one rank: what `order.py` says is next, read from `shards.py`.

The only state is one integer, the samples consumed, which the trainer advances when a step is complete; what
workers have read ahead never counts. All else in `OrderState` says which order and which corpus it counts in.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pretrain.config import ConfigError, DataConfig, RunError, SourceConfig
from pretrain.heartbeat import memory_ran_out
from pretrain.order import (
    Ints,
    Location,
    Order,
    OrderState,
    SourceSize,
    choose_lanes,
    rank_samples,
    step_start,
)
from pretrain.remote import ReadOptions
from pretrain.shards import Corpus

IGNORED_LABEL = -100
"""Label of a position at which nothing is to be predicted."""
_PR_SET_PDEATHSIG = 1  # prctl(2): the signal that a process gets when its parent dies
_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}

Packed = NDArray[np.int32]


class Batch(NamedTuple):
    """B sequences of T tokens; every tensor is int64 [B, T]."""

    tokens: Tensor
    labels: Tensor
    """The next token; IGNORED_LABEL at the end of a chunk, at the end of a document when masking, in padding."""
    positions: Tensor
    """Position within the visible piece of the document (when masking), else within the sequence."""
    document_ids: Tensor
    """Documents of the sequence, counted from 0, padding being one of its own; all 0 without masking."""
    samples: Ints
    """Global sample indices, [B]."""


def build_batch(
    corpora: Sequence[Corpus],
    locations: Location,
    sequence_length: int,
    document_masking: bool,
    samples: Ints | None = None,
) -> Batch:
    """Read the sequences at `locations` (whose source is an index into `corpora`).

    A sequence that the chunk does not fill is padded with the corpus's eos. `samples` are the global indices to
    put into the batch, by default 0 to B - 1. Raises CorruptShardError.
    """
    packed = _read_sequences(corpora, locations, sequence_length, document_masking)
    return _unpack(packed, np.arange(len(locations.source)) if samples is None else samples)


def _unpack(packed: Packed, samples: Ints) -> Batch:
    """In page-locked memory where there is a GPU, so that it is copied there in the background."""
    tensor = torch.empty(packed.shape, dtype=torch.int64, pin_memory=torch.cuda.is_available())
    tokens, labels, positions, document_ids = tensor.copy_(torch.from_numpy(packed)).unbind(0)
    return Batch(tokens, labels, positions, document_ids, samples)


def _read_sequences(
    corpora: Sequence[Corpus], locations: Location, sequence_length: int, document_masking: bool
) -> Packed:
    """Tokens, labels, positions and document ids: [4, B, T]."""
    n = len(locations.source)
    tokens = np.empty((n, sequence_length + 1), np.int32)  # one beyond the sequence: the last label
    n_read = np.empty((n, 1), np.int64)
    begins = np.zeros((n, sequence_length + 1), np.bool_)  # a document, or the padding, begins here
    where = zip(locations.source.tolist(), locations.chunk.tolist(), locations.sequence.tolist(), strict=True)
    for row, (source, chunk, sequence) in enumerate(where):
        corpus, start = corpora[source], sequence * sequence_length
        found = corpus.read(chunk, start, start + sequence_length + 1)
        tokens[row, : len(found)] = found
        tokens[row, len(found) :] = corpus.manifest.eos_id
        n_read[row] = len(found)
        if document_masking:
            starts = corpus.documents(chunk).starts
            low, high = starts.searchsorted((start + 1, start + sequence_length + 1))
            begins[row, starts[low:high] - start] = True
            begins[row, len(found) : len(found) + 1] = True  # the padding, where there is any
    out = np.empty((4, n, sequence_length), np.int32)
    within = np.arange(sequence_length, dtype=np.int32)
    out[0] = tokens[:, :-1]
    out[1] = np.where((within + 1 < n_read) & ~begins[:, 1:], tokens[:, 1:], IGNORED_LABEL)
    out[2] = within
    if document_masking:
        out[2] -= np.maximum.accumulate(np.where(begins[:, :-1], within, 0), axis=1)
    np.cumsum(begins[:, :-1], axis=1, out=out[3])
    return out


class TrainLoader:
    """The training batches of one rank.

    `state` is what a checkpoint held, or None for a new run. Raises ConfigError where the configuration, the
    corpora and that state do not fit together.
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
        total_samples: int,
        state: OrderState | None,
    ) -> None:
        if global_batch_sequences % (micro_batch_sequences * world_size):
            raise ConfigError(
                f"global_batch_sequences={global_batch_sequences} is not a multiple of "
                f"micro_batch_sequences={micro_batch_sequences} x {world_size} ranks"
            )
        sources = data.corpora()
        options = ReadOptions.of(data)
        corpora = [Corpus(source.manifest, data.verify_chunks, options=options) for source in sources]
        _check_corpora(sources, corpora, data.sequence_length)
        sizes = [SourceSize(c.n_chunks, c.chunk_tokens, c.last_chunk_tokens) for c in corpora]
        lanes = data.lanes or (state.lanes if state else choose_lanes(sizes, global_batch_sequences))
        self.state = OrderState(
            manifest_sha=[corpus.manifest.root_sha256 for corpus in corpora],
            seed=seed,
            stages=_stages(data, sources, lanes),
            consumed_samples=0,
            lanes=lanes,
            chunk_tokens=[corpus.chunk_tokens for corpus in corpora],
            window_chunks=data.window_chunks,
            sequence_length=data.sequence_length,
        )
        if state is not None:
            state.check_compatible(self.state)
            self.state.consumed_samples = state.consumed_samples
            self.state.passed_over = state.passed_over
        self.order = Order(
            sizes,
            self.state.stages,
            sequence_length=data.sequence_length,
            lanes=lanes,
            window_chunks=data.window_chunks,
            seed=seed,
        )
        first = corpora[0].manifest
        self.tokenizer_sha256, self.vocab_size = first.tokenizer_sha256, first.vocab_size
        self.bos_id, self.eos_id = first.bos_id, first.eos_id
        self.grad_accum_steps = global_batch_sequences // (micro_batch_sequences * world_size)
        self._data, self._dataset = data, _MicroBatches(corpora, self.order, data)
        self._plan = _Plan(
            total_samples, global_batch_sequences, micro_batch_sequences, lanes, rank, world_size
        )

    def state_at(self, consumed_samples: int) -> OrderState:
        """The state to save after the steps that consumed so many samples of the run."""
        return replace(self.state, consumed_samples=consumed_samples)

    def steps(self, first_step_sample: int) -> Iterator[list[Batch]]:
        """The micro batches of each optimizer step, from a global sample index to the last whole step of the run.

        The iterator owns its worker processes, which end with it; call again to start elsewhere. Raises
        CorruptShardError, and RunError where a worker process died.
        """
        starts = partial(self._plan.step_starts, first_step_sample, list(self.state.passed_over))
        loader = _data_loader(self._dataset, self._plan.micro_batches(starts()), self._data)
        micro_batches = _start_workers(loader) if self._data.loader_workers else iter(loader)
        for _ in starts():
            yield [_receive(micro_batches) for _ in range(self.grad_accum_steps)]


def _check_corpora(sources: list[SourceConfig], corpora: list[Corpus], sequence_length: int) -> None:
    first = corpora[0].manifest
    for source, corpus in zip(sources, corpora, strict=True):
        for name in ("tokenizer_sha256", "vocab_size", "bos_id", "eos_id"):
            here, there = getattr(corpus.manifest, name), getattr(first, name)
            if here != there:
                raise ConfigError(
                    f"data.sources: {source.name!r} has {name} {here}, {sources[0].name!r} has {there}; "
                    "prepare all sources of a run with the same tokenizer"
                )
        if corpus.chunk_tokens % sequence_length:
            fits = max(t for t in range(1, sequence_length) if corpus.chunk_tokens % t == 0)
            raise ConfigError(
                f"data.sequence_length={sequence_length} does not divide the chunks of {source.manifest}, which "
                f"have {corpus.chunk_tokens} tokens; {fits} would, or prepare the corpus with other chunk_tokens"
            )


def _stages(data: DataConfig, sources: list[SourceConfig], lanes: int) -> list[tuple[int, list[float]]]:
    """First sample, a multiple of `lanes`, and weights of each stage."""
    stages = [(0, [float(source.weight) for source in sources])]
    for stage in data.stages:
        row = -(-stage.start_tokens // (data.sequence_length * lanes))
        stages.append((row * lanes, [float(stage.weights.get(source.name, 0.0)) for source in sources]))
    return stages


class _Plan(NamedTuple):
    """Which samples each step, and each micro batch of this rank, holds."""

    total_samples: int
    per_step: int
    per_micro_batch: int
    lanes: int
    rank: int
    world_size: int

    def step_starts(self, first_sample: int, passed_over: list[list[int]]) -> Iterator[int]:
        """The first sample of each whole step; as many are added at the end as were passed over."""
        end = self.total_samples + sum(stop - start for start, stop in passed_over)
        start = step_start(first_sample, self.per_step, passed_over)
        while start + self.per_step <= end:
            yield start
            start = step_start(start + self.per_step, self.per_step, passed_over)

    def micro_batches(self, step_starts: Iterator[int]) -> Iterator[Ints]:
        for start in step_starts:
            mine = rank_samples(
                start, self.per_step, lanes=self.lanes, rank=self.rank, world_size=self.world_size
            )
            yield from mine.reshape(-1, self.per_micro_batch)


class _MicroBatches(Dataset):
    """A map from the global indices of a micro batch to (packed [4, B, T], samples [B]).

    Arrays, not tensors: they travel through a pipe, while tensors would need shared memory (of which a container
    has 64 MB by default) and a socket server in every worker.
    """

    def __init__(self, corpora: list[Corpus], order: Order, data: DataConfig) -> None:
        self._corpora, self._order = corpora, order
        self._sequence_length, self._document_masking = data.sequence_length, data.document_masking

    def __getitem__(self, samples: Ints) -> tuple[Packed, Ints] | Exception:
        where = self._order.locate(samples)
        try:
            packed = _read_sequences(self._corpora, where, self._sequence_length, self._document_masking)
        except (RunError, OSError) as error:
            return error  # as a value: raised here, its sentence would reach the trainer inside a traceback
        return packed, samples


def _data_loader(dataset: _MicroBatches, micro_batches: Iterator[Ints], data: DataConfig) -> DataLoader:
    workers = data.loader_workers
    return DataLoader(
        dataset,
        sampler=micro_batches,
        batch_size=None,  # an item is a whole micro batch already
        collate_fn=_as_is,
        num_workers=workers,
        prefetch_factor=data.prefetch_batches if workers else None,
        worker_init_fn=partial(_start_worker, os.getpid()) if workers else None,
        # Not forked: gloo, autograd and OpenMP have threads in the trainer, and one of them in the wrong place at
        # that moment leaves the child hanging in fork (seen once in 23 starts). Costs two seconds at the start.
        multiprocessing_context="spawn" if workers else None,
        generator=torch.Generator(),  # or each new iterator would draw from the generator that dropout uses
    )


def _as_is(item: Any) -> Any:
    return item


def _start_workers(loader: DataLoader) -> Iterator[Any]:
    """The loader's iterator, its workers started with `_STOP_SIGNALS` blocked in all threads from the first moment."""
    resource_tracker.ensure_running()  # by itself it would start now, and unblock two of them again
    allowed = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, allowed)
    # torch raises a dead worker's RuntimeError in whatever the trainer is just doing, most likely in a forward pass.
    handler = signal.getsignal(signal.SIGCHLD)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if callable(handler) and not isinstance(handler, _DeadWorkerHandler) and in_main_thread:
        signal.signal(signal.SIGCHLD, _DeadWorkerHandler(handler))
    return batches


class _DeadWorkerHandler:
    """torch's handler of SIGCHLD, but what it raises is a sentence."""

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self._handler = handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        try:
            self._handler(number, frame)
        except RuntimeError as error:
            raise _dead_worker(error) from error


def _dead_worker(error: RuntimeError) -> RunError:
    reason = str(error).splitlines()[0].rstrip(" .")
    cause = "the kernel ran out of memory" if memory_ran_out() else "killed from outside"
    return RunError(
        f"a process that reads training data died ({reason}): {cause}; start again to go on from the last checkpoint"
    )


def _start_worker(trainer_pid: int, _: int) -> None:
    # If the trainer is killed its workers must go at once, not at torch's next look, 5 s later.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != trainer_pid:  # it was killed before the kernel knew of this wish
        os._exit(1)
    # A request to stop (Ctrl-C, Slurm, the launcher) reaches every process of a job, but only the trainer may act
    # on it: it finishes the step and saves. So workers, in which these signals are blocked, obey no one else.
    threading.Thread(target=_obey_the_trainer, daemon=True).start()
    torch.set_num_threads(1)


def _obey_the_trainer() -> None:
    while signal.sigwaitinfo(_STOP_SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)


def _receive(micro_batches: Iterator[Any]) -> Batch:
    try:
        item = next(micro_batches)
    except RuntimeError as error:
        if "DataLoader worker (pid" in str(error):
            raise _dead_worker(error) from error
        raise
    if isinstance(item, Exception):
        try:
            raise item
        finally:
            del item  # else it and this frame hold each other, and the workers with them
    return _unpack(*item)
