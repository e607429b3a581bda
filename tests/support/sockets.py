"""Finds listening TCP sockets and the processes that hold them."""

from __future__ import annotations

import os
from pathlib import Path


def listening_sockets() -> dict[str, str]:
    """Local address of every listening TCP socket in this network namespace, by inode."""
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A":  # LISTEN
                found[words[9]] = words[1]
    return found


def sockets_of(process: int, listeners: dict[str, str]) -> set[tuple[str, str]]:
    seen = set()
    try:
        name = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            target = os.readlink(descriptor)
            if target.startswith("socket:[") and target[8:-1] in listeners:
                seen.add((name, listeners[target[8:-1]]))
    except OSError:  # the process has ended in the meantime
        pass
    return seen
