"""Processes of this host: what /proc says of them, and how the death of a parent reaches its children.

Imports the standard library alone, since each rank's watcher uses it; psutil would add to every start.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
from pathlib import Path
from typing import NamedTuple

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # prctl(2)


class ProcessStatus(NamedTuple):
    """What the kernel says of a process."""

    state: str
    """One letter: T or t is stopped, Z has ended and waits for its parent, X is gone."""
    parent: int
    """Process id; 0 where the process is gone."""


def status_of(pid: int) -> ProcessStatus:
    """State and parent of a process, or that it is gone."""
    try:  # the name, in parentheses, may hold anything
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return ProcessStatus("X", 0)
    return ProcessStatus(state, int(parent))


def own_memory_bytes(key: str) -> int:
    """Resident memory of this process: now for the key VmRSS, and at most since it was started for VmHWM.

    getrusage() knows the maximum too, but a process inherits it from the one that started it.
    """
    match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None, key
    return int(match[1]) << 10


def command_line_of(pid: int) -> bytes:
    """The words of a process's command, each ended by a zero byte. Raises OSError where the process is gone."""
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def descendants() -> list[int]:
    """Living processes below this one. `adopt_orphans` keeps those below it whose parents have died."""
    # One whose parent dies while the processes are looked at is missed, so that none is found counts the second time.
    return _descendants() or _descendants()


def _descendants() -> list[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        pid = int(path.name)
        status = status_of(pid)
        if status.state not in "ZX":
            children.setdefault(status.parent, []).append(pid)
    found, below = [], [os.getpid()]
    while below:
        below = [child for parent in below for child in children.get(parent, [])]
        found += below
    return found


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parents die; it has to wait for them."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def signal_at_parent_death(number: int) -> None:
    """Have the kernel send a signal to this process when its parent dies; nothing comes if it has died already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def end_with_parent(parent: int, number: int = signal.SIGTERM) -> None:
    """Have this process get a signal when the process `parent`, which started it, dies, or now if it has."""
    signal_at_parent_death(number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)
