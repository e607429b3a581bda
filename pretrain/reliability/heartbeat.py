"""What a process and its watcher both look at: marks of progress, and the kernel's word on memory. Imports no torch."""

from __future__ import annotations

import mmap
import os
import re
import signal
import struct
import time
from pathlib import Path
from typing import NamedTuple

_LAYOUT = struct.Struct("<qqd32s256s")
SIZE_BYTES = _LAYOUT.size
LAUNCHER_LOST = "loss of the launcher"
"""The reason of a stop that nobody asked for: the ranks save, and the run should be started again."""
LAUNCHER_LOST_SIGNAL = signal.SIGRTMIN
"""To a rank: from the kernel when its parent ends, from its watcher when a launcher above that does."""


class Heartbeat(NamedTuple):
    """What a process last said of itself."""

    marks: int
    """Marks made so far; all ranks of a run make the same ones."""
    step: int
    time_s: float
    """Monotonic clock at the last mark; processes of one host share that clock."""
    phase: str
    last_words: str
    """Why it is about to end, or nothing."""


_memory: mmap.mmap | None = None
_last = Heartbeat(0, 0, 0.0, "", "")


def attach(descriptor: int) -> None:
    """From now on `mark` writes into this file of SIZE_BYTES."""
    global _memory
    _memory = mmap.mmap(descriptor, SIZE_BYTES)
    mark("start")


def mark(phase: str, step: int | None = None, last_words: str = "") -> None:
    """This process has come to `phase` (at most 32 bytes) of `step`, by default the last one named."""
    global _last
    if _memory is None:
        return
    step = _last.step if step is None else step
    _last = Heartbeat(_last.marks + 1, step, 0.0, phase, last_words)
    touch()


def touch() -> None:
    """This process works on at what it marked last."""
    global _last
    if _memory is not None:
        _last = _last._replace(time_s=time.monotonic())
        _LAYOUT.pack_into(_memory, 0, *_last[:3], _last.phase.encode(), _last.last_words.encode()[:256])


def read(descriptor: int) -> Heartbeat:
    """What the process at the other end has marked last."""
    count, step, at, phase, words = _LAYOUT.unpack(os.pread(descriptor, SIZE_BYTES, 0))
    texts = (text.rstrip(b"\0").decode(errors="replace") for text in (phase, words))
    return Heartbeat(count, step, at, *texts)


def oom_kills() -> int:
    """Processes that this kernel has killed for lack of memory so far."""
    try:
        found = re.search(r"^oom_kill (\d+)", Path("/proc/vmstat").read_text(), re.M)
    except OSError:
        found = None
    return int(found[1]) if found else 0


_OOM_KILLS_BEFORE = oom_kills()


def memory_ran_out() -> bool:
    """Whether the kernel has killed a process of this host for lack of memory since this process began."""
    return oom_kills() > _OOM_KILLS_BEFORE
