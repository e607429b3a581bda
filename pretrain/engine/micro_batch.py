"""`micro_batch_sequences=auto`: the largest micro batch whose forward and backward pass fit this rank's memory.

Each probe is a real optimizer step on random tokens. Its loss limit is below any loss, so the update is skipped as
after a spike, and a probe leaves weights, moments and random state unchanged.
"""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pretrain.batch import Batch
from pretrain.checkpoint.state import RunState
from pretrain.config import TrainConfig
from pretrain.config.data_stages import micro_batch_of
from pretrain.config.launched import launched_local_size
from pretrain.device import device_type
from pretrain.distributed import World, gather_objects
from pretrain.engine.engine import Engine
from pretrain.errors import ConfigError, RunError
from pretrain.reliability.heartbeat import mark
from pretrain.reliability.processes import own_memory_bytes

USABLE_FRAC = 0.9
"""Fraction of a rank's memory that a micro batch may take. The rest is for fragmentation, communication buffers and
reader processes, which probes do not have."""
LARGEST_STRIDE = 4
"""A probe has at most this many times the sequences of the largest one before it, even if more are predicted to fit."""
SHAPES_MEMORY = ("model.", "lora.", "engine.", "kernels.", "optim.", "data.", "global_batch_sequences")
"""Prefixes of the configuration keys on which the result depends."""
GIB = 2**30


class Shape(NamedTuple):
    """The size of one forward pass of a rank."""

    sequences: int
    """B: number of sequences."""
    sequence_length: int
    """T: tokens per sequence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """The memory that a forward and backward pass of one shape took."""

    sequences: int
    """B: number of sequences."""
    sequence_length: int
    """T: tokens per sequence."""
    peak_bytes: int
    """Peak memory in bytes of the rank that used the most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundMicroBatch:
    """The largest micro batch that fits all ranks."""

    micro_batch_sequences: int
    """Sequences per rank and forward pass."""
    usable_bytes: int
    """Bytes that a micro batch may take: USABLE_FRAC of the budget of the rank with the smallest budget."""
    probes: list[Probe]
    """All probes, in the order in which they were made."""
    time_s: float
    """Duration of the search in seconds."""

    def facts(self) -> dict[str, Any]:
        """The fields of the event `micro_batch_found`."""
        return asdict(self)


def earlier_result(state: RunState, changed: list[str], world: World) -> int | None:
    """The micro batch that the run found at an earlier start, if it still fits; None if a new search is needed.

    A bit-identical resume needs the same micro batch. `changed` names the configuration keys that have changed.
    """
    same = state["world_size"] == world.size and not any(key.startswith(SHAPES_MEMORY) for key in changed)
    found = state["config"].get("micro_batch_sequences")
    return found if same and state.get("micro_batch_found") and type(found) is int and found > 0 else None


def find_micro_batch(
    engine: Engine, config: TrainConfig, world: World, budget_bytes: Callable[[], int] | None = None
) -> FoundMicroBatch:
    """Find the largest micro batch with the run's own engine, before the first step and before a checkpoint is loaded.

    All ranks call this together. `budget_bytes` returns the memory that this rank may use; by default it is the memory
    that its device or host has left. Raises ConfigError on all ranks if not even one sequence fits, and RunError on a
    rank that runs out of device memory.
    """
    started = time.monotonic()
    budget = budget_bytes or (lambda: _budget_bytes(engine, world))
    shapes = _shapes_of_candidates(config, world)
    measured: dict[Shape, int] = {}
    probes: list[Probe] = []

    def measure(shape: Shape) -> None:
        mark("probe")
        own = _peak_bytes(engine, config, world, shape, _largest_fitting(shapes, measured, usable))
        measured[shape] = max(gather_objects(own, world))
        probes.append(Probe(**shape._asdict(), peak_bytes=measured[shape]))

    usable = 0
    at_rest = 0
    for length in sorted({shape.sequence_length for needed in shapes.values() for shape in needed}):
        _run_probe(
            engine, config, world, Shape(1, length)
        )  # the first pass includes one-time allocations, so it is not measured
        at_rest = max(gather_objects(_memory_bytes(), world))
        usable = int(USABLE_FRAC * min(gather_objects(budget(), world)))
        measure(Shape(1, length))
    while (shape := next_probe(shapes, measured, at_rest, usable)) is not None:
        measure(shape)
    best = _largest_fitting(shapes, measured, usable)
    if best is None:
        worst = max(probes, key=lambda probe: probe.peak_bytes)
        raise ConfigError(
            f"micro_batch_sequences=auto: one sequence of {worst.sequence_length} tokens takes "
            f"{worst.peak_bytes / GIB:.2f} GiB, and a rank may use {usable / GIB:.2f} GiB; {_ADVICE}"
        )
    return FoundMicroBatch(
        micro_batch_sequences=best,
        usable_bytes=usable,
        probes=probes,
        time_s=time.monotonic() - started,
    )


_ADVICE = (
    "set model.activation_checkpointing=full, engine=zero3_offload or a shorter data.sequence_length, "
    "or take more ranks"
)


# ---- the choice, in plain numbers ------------------------------------------------------------------------------------


def _shapes_of_candidates(config: TrainConfig, world: World) -> dict[int, set[Shape]]:
    """Each micro batch that divides a rank's sequences, with the shapes of its forward passes in all data stages."""
    share = config.global_batch_sequences // world.n_readers
    return {
        candidate: {
            Shape(
                micro_batch_of(
                    stage.batch_sequences,
                    stage.sequence_length,
                    world.n_readers,
                    candidate * config.data.sequence_length,
                ),
                stage.sequence_length,
            )
            for stage in config.stages
        }
        for candidate in range(1, share + 1)
        if share % candidate == 0
    }


def _largest_fitting(shapes: dict[int, set[Shape]], measured: dict[Shape, int], usable: int) -> int | None:
    """The largest candidate whose shapes have all been measured and fit."""
    return max(
        (c for c, needed in shapes.items() if all(measured.get(s, usable + 1) <= usable for s in needed)),
        default=None,
    )


def next_probe(
    shapes: dict[int, set[Shape]], measured: dict[Shape, int], at_rest: int, usable: int
) -> Shape | None:
    """The shape to measure next; None if nothing larger is expected to fit.

    `shapes` are the forward passes of each candidate. `measured` gives the bytes of the shapes measured so far, which
    include one sequence of each length. `at_rest` is the number of bytes in use between probes.

    Memory is assumed to be affine in the number of sequences of one length. A shape is measured only if the line
    through the two largest known ones of its length predicts that it fits, because a single rank that runs out
    of memory leaves the others waiting in a collective.
    """
    best = _largest_fitting(shapes, measured, usable)
    if any(count == 1 and bytes_ > usable for (count, _), bytes_ in measured.items()):
        return None
    larger = sorted((c for c in shapes if best is None or c > best), reverse=True)
    for n, length in sorted({shape for c in larger for shape in shapes[c]}):
        two = Shape(2, length)  # a line needs two points
        alone = [m for m, of in measured if of == length] == [1]
        if n > 1 and alone and _foretold(two, measured, at_rest) <= usable:
            return two
    for candidate in larger:
        unknown = [shape for shape in sorted(shapes[candidate]) if shape not in measured]
        known = [shape for shape in shapes[candidate] if shape in measured]
        if any(measured[shape] > usable for shape in known):
            continue
        if all(_foretold(shape, measured, at_rest) <= usable for shape in unknown):
            return _within_stride(unknown[0], measured)
    return None


def _foretold(shape: Shape, measured: dict[Shape, int], at_rest: int) -> int:
    """Predicted bytes, from the line through the two largest measured shapes of this length.

    With only one measured shape, the prediction is an upper bound.
    """
    of_length = sorted((n, size) for (n, length), size in measured.items() if length == shape.sequence_length)
    n, size = of_length[-1]
    if len(of_length) == 1:
        return size + (shape.sequences - n) * max(0, size - at_rest)
    m, smaller = of_length[-2]
    return size + round((shape.sequences - n) * max(0, size - smaller) / (n - m))


def _within_stride(shape: Shape, measured: dict[Shape, int]) -> Shape:
    """The shape, or a smaller one if it is more than LARGEST_STRIDE times the largest measured one."""
    largest = max(n for n, length in measured if length == shape.sequence_length)
    return shape._replace(sequences=min(shape.sequences, LARGEST_STRIDE * largest))


# ---- probes ----------------------------------------------------------------------------------------------------------


def _run_probe(engine: Engine, config: TrainConfig, world: World, shape: Shape) -> None:
    """Run one step of two micro batches without an update. During the second, the gradients of the first are in memory.

    With torch.compile, each probe compiles its shape, because compiled shapes are static, even if the run does not use
    that shape later.
    """
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size or 0, shape)
    of_batch = torch.from_numpy(tokens)
    positions = torch.arange(shape.sequence_length).expand_as(of_batch).contiguous()
    labels = of_batch % len(config.model.classes) if config.model.classes else of_batch
    batch = Batch(of_batch, labels, positions, torch.zeros_like(of_batch), np.arange(shape.sequences))
    result = engine.train_step([batch, batch._replace()], step=0, lr=0.0, loss_limit=-1.0)
    assert result is not None
    assert result.skipped, "every loss is above -1"


def _peak_bytes(engine: Engine, config: TrainConfig, world: World, shape: Shape, fitting: int | None) -> int:
    """The most memory that this rank holds during a probe."""
    cuda = world.device.type == "cuda"
    _memory_bytes()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    try:
        _run_probe(engine, config, world, shape)
    except torch.OutOfMemoryError as error:
        # The run cannot continue: other ranks may wait in a collective, and DeepSpeed's hooks are only half done.
        raise RunError(
            f"micro_batch_sequences=auto: a probe of {shape.sequences} x {shape.sequence_length} tokens ran out of "
            f"memory ({str(error).splitlines()[0]}); "
            + (f"set micro_batch_sequences={fitting}" if fitting is not None else _ADVICE)
        ) from error
    if cuda:
        return torch.cuda.max_memory_allocated()
    return own_memory_bytes("VmHWM")


def _memory_bytes() -> int:
    """Bytes of memory that this process holds, after it has returned freed memory to the system."""
    gc.collect()
    if device_type() == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc keeps freed memory: see pretrain.distributed
        libc.malloc_trim(0)
    return own_memory_bytes("VmRSS")


# ---- the available memory --------------------------------------------------------------------------------------------


def _budget_bytes(engine: Engine, world: World) -> int:
    """Bytes that this rank may hold: its device's memory, or its share of the host's, less the checkpoint copy."""
    if world.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved()
    n_ranks = launched_local_size() or 1
    left = min(_available_bytes(), _cgroup_left_bytes())
    state = engine.state
    saved = [torch.Size(state.shapes[key.split(".", 1)[1]]) for key in state.weight_keys + state.moment_keys]
    snapshot = 4 * sum(shape.numel() for shape in saved) // world.size
    return own_memory_bytes("VmRSS") + left // n_ranks - snapshot


def _available_bytes() -> int:
    """Bytes of host memory that are still available to programs."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text("ascii"), re.M)
    assert found
    return int(found[1]) * 1024


def _cgroup_left_bytes(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that the control groups (version 1 or 2) of this process still allow.

    Files that are cached in memory do not count as used, because the kernel drops them when memory is needed.
    """
    left = 2**63
    for line in own.read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / controllers
        limit = "memory.limit_in_bytes" if controllers else "memory.max"
        usage = "memory.usage_in_bytes" if controllers else "memory.current"
        folder = top / name.lstrip("/")
        for group in (folder, *folder.parents):
            # A container may see its own group as the root. If a file is missing, there is no limit.
            with suppress(OSError, ValueError):  # ValueError: the limit is "max"
                most, used = int((group / limit).read_text()), int((group / usage).read_text())
                cached = re.findall(r"inactive_file (\d+)", (group / "memory.stat").read_text())
                left = min(left, most - used + int(cached[-1]))  # version 1 ends with the totals
            if group == top:
                break
    return left
