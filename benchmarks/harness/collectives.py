"""Counts the bytes that this process's collectives move, and the time that it waits for them.

`watch` wraps every collective of torch.distributed once. It must run before other code keeps aliases of them, as
DeepSpeed does when it takes over the process group. After that, `counted` records what happens in a block. Collectives
that C++ code starts are not seen: those of DistributedDataParallel and of compiled functional collectives.

The bytes are those of the whole tensor: the input of an all-reduce, broadcast or reduce-scatter, and the output of an
all-gather. In a ring, each of N ranks sends (N-1)/N of them, and twice that for an all-reduce.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

WATCHED = {
    "all_reduce": "tensor",
    "all_reduce_coalesced": "tensors",
    "reduce": "tensor",
    "broadcast": "tensor",
    "all_gather": "tensor_list",
    "all_gather_into_tensor": "output_tensor",
    "all_gather_single": "output_tensor",
    "reduce_scatter": "input_list",
    "reduce_scatter_tensor": "input",
    "reduce_scatter_single": "input",
    "all_to_all_single": "output",
    "all_to_all": "output_tensor_list",
    "gather": "tensor",
    "scatter": "tensor",
    "send": "tensor",
    "isend": "tensor",
}
"""For each collective, the torch name of the argument whose bytes are counted."""
_SECOND_ARGUMENT = ("input", "input_list")  # names of second arguments; all other names are first arguments
_FORMER_NAMES = {
    "all_gather_single": "all_gather_into_tensor",
    "reduce_scatter_single": "reduce_scatter_tensor",
}
"""Collectives that torch 2.13 renamed. One name calls the other there, so both count under one name."""


class Kind(NamedTuple):
    """One kind of collective."""

    phase: str
    """Phase of the step, as named by the caller; empty by default."""
    name: str
    dtype: str


class Traffic:
    """The calls, bytes and time of collectives while this was active."""

    def __init__(self, device: torch.device | None = None) -> None:
        """With a CUDA `device`, each call waits for its collective, to measure it, so nothing overlaps with it."""
        self.calls: Counter[Kind] = Counter()
        self.bytes: Counter[Kind] = Counter()
        self.seconds = 0.0
        """Time that the calling threads spent in collectives or waiting for them."""
        self.phase = ""
        self._synchronize = device is not None and device.type == "cuda"
        self._inside = False

    @property
    def is_inside(self) -> bool:
        """Whether this thread is in a collective, whose inner calls must not be counted again."""
        return self._inside

    def by_kind(self, counter: Counter[Kind]) -> dict[str, int]:
        """The sum of `calls` or `bytes` over all phases, under keys `name dtype`."""
        sums: Counter[str] = Counter()
        for kind, number in counter.items():
            sums[f"{kind.name} {kind.dtype}"] += number
        return dict(sums)

    def note(self, name: str, moved: torch.Tensor | list[torch.Tensor]) -> None:
        """Count one call and the bytes that it moves."""
        tensors = [moved] if isinstance(moved, torch.Tensor) else moved
        kind = Kind(self.phase, name, str(tensors[0].dtype).removeprefix("torch."))
        self.calls[kind] += 1
        self.bytes[kind] += sum(t.numel() * t.element_size() for t in tensors)

    def timed(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Make a call, add its time, and return its result."""
        self._inside = True
        started = self._now()
        try:
            return call(*args, **kwargs)
        finally:
            self.seconds += self._now() - started
            self._inside = False

    def _now(self) -> float:
        if self._synchronize:
            torch.cuda.synchronize()
        return time.perf_counter()


_active: Traffic | None = None
_watching = False


@contextmanager
def counted(traffic: Traffic) -> Iterator[Traffic]:
    """Add to `traffic` everything that is moved in the block. `watch` must have been called before."""
    global _active
    assert _watching, "watch() comes first: nothing would be counted"
    before, _active = _active, traffic
    try:
        yield traffic
    finally:
        _active = before


def watch() -> None:
    """Wrap the collectives, once per process. Outside of `counted` they behave as before."""
    global _watching
    if _watching:
        return
    _watching = True
    for name, argument in WATCHED.items():
        if not hasattr(distributed_c10d, name):  # a collective of another version of torch
            continue
        wrapped = _wrapped(name, argument, getattr(distributed_c10d, name))
        setattr(distributed_c10d, name, wrapped)  # torch's own object collectives look it up here
        setattr(dist, name, wrapped)
    wait = dist.Work.wait

    def timed_wait(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
        traffic = _active
        if traffic is None or traffic.is_inside:
            return wait(work, *args, **kwargs)
        return traffic.timed(wait, work, *args, **kwargs)

    dist.Work.wait = timed_wait  # type: ignore[assignment]


def _wrapped(name: str, argument: str, inner: Callable[..., Any]) -> Callable[..., Any]:
    position = 1 if argument in _SECOND_ARGUMENT else 0

    @functools.wraps(inner)
    def call(*args: Any, **kwargs: Any) -> Any:
        traffic = _active
        if traffic is None or traffic.is_inside:
            return inner(*args, **kwargs)
        moved = kwargs[argument] if argument in kwargs else args[position]
        traffic.note(_FORMER_NAMES.get(name, name), moved)
        return traffic.timed(inner, *args, **kwargs)

    return call
