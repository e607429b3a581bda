"""What a process tells its watcher (marks of progress), and the kernel's count of OOM kills. Imports no torch."""

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
"""The reason of a stop that nobody requested. The ranks save and end, and the supervisor starts the run again."""
LAUNCHER_LOST_SIGNAL = signal.SIGRTMIN
"""Tells a rank that its launcher died: the kernel sends it for the rank's parent, the watcher for any above that."""


class Heartbeat(NamedTuple):
    """The progress that a process has last reported to its watcher."""

    marks: int
    """The number of marks so far. All ranks make the same marks, so the rank with the fewest is the furthest behind."""
    step: int
    """The step that the process is working on; 0 before the first."""
    time_s: float
    """The time of the last sign of life, in seconds on the monotonic clock, which all processes of a host share."""
    phase: str
    """What the process is doing, at most 32 bytes."""
    last_words: str
    """The error because of which the process is about to end, at most 256 bytes; empty if there is none."""


_memory: mmap.mmap | None = None
_last = Heartbeat(0, 0, 0.0, "", "")


def attach(descriptor: int) -> None:
    """Have `mark` and `touch` write into this open file, which has SIZE_BYTES bytes, from now on."""
    global _memory
    _memory = mmap.mmap(descriptor, SIZE_BYTES)
    mark("start")


def mark(phase: str, step: int | None = None, last_words: str = "") -> None:
    """Report that this process has reached `phase` (at most 32 bytes) of `step`, by default that of the last mark."""
    global _last
    if _memory is None:
        return
    step = _last.step if step is None else step
    _last = Heartbeat(_last.marks + 1, step, 0.0, phase, last_words)
    touch()


def touch() -> None:
    """Report that this process is still working on what it marked last, so that it is not taken for hung."""
    global _last
    if _memory is not None:
        _last = _last._replace(time_s=time.monotonic())
        _LAYOUT.pack_into(_memory, 0, *_last[:3], _last.phase.encode(), _last.last_words.encode()[:256])


def read(descriptor: int) -> Heartbeat:
    """The last heartbeat of the process that writes into the file."""
    count, step, at, phase, words = _LAYOUT.unpack(os.pread(descriptor, SIZE_BYTES, 0))
    texts = (text.rstrip(b"\0").decode(errors="replace") for text in (phase, words))
    return Heartbeat(count, step, at, *texts)


def oom_kills() -> int:
    """The number of processes that this host's kernel has killed for lack of memory since it booted."""
    try:
        found = re.search(r"^oom_kill (\d+)", Path("/proc/vmstat").read_text(), re.M)
    except OSError:
        found = None
    return int(found[1]) if found else 0


_OOM_KILLS_BEFORE = oom_kills()


def memory_ran_out() -> bool:
    """Whether the kernel has killed a process of this host for lack of memory since this process began."""
    return oom_kills() > _OOM_KILLS_BEFORE
