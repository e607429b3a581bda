"""Processes of this host: what /proc says about them, and how children learn of the death of their parent.

This module imports the standard library only. The watcher of each rank uses it, and importing psutil would delay
every start.
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
    """What /proc says about a process."""

    state: str
    """One letter: T or t means stopped, Z ended but not yet waited for by its parent, X gone."""
    parent: int
    """The process id of the parent; 0 if the process is gone."""


def status_of(pid: int) -> ProcessStatus:
    """The state and the parent of a process. One that does not exist has state X."""
    try:  # the name, in parentheses, may contain spaces and parentheses
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return ProcessStatus("X", 0)
    return ProcessStatus(state, int(parent))


def own_memory_bytes(key: str) -> int:
    """Resident memory of this process in bytes: the current value for the key VmRSS, its peak for VmHWM.

    getrusage() reports a peak too, but that one is inherited from the process that started this one.
    """
    match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None, key
    return int(match[1]) << 10


def command_line_of(pid: int) -> bytes:
    """The words of a process's command line, each followed by a zero byte. Raises OSError if the process is gone."""
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def descendants() -> list[int]:
    """Process ids of the living descendants of this process. After `adopt_orphans`, orphans are among them."""
    # A process whose parent dies during the scan can be missed, so an empty result is trusted only the second time.
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
    """Have descendants whose parents die become children of this process, which then has to wait for them."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def signal_at_parent_death(number: int) -> None:
    """Have the kernel send a signal to this process when its parent dies. If it is dead already, no signal comes."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def end_with_parent(parent: int, number: int = signal.SIGTERM) -> None:
    """Have this process get a signal when `parent`, the process that started it, dies, or now if it is already dead."""
    signal_at_parent_death(number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)
