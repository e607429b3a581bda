"""The largest resident memory that this process has had."""

from __future__ import annotations

from pathlib import Path


def peak_bytes(*, reset: bool = False) -> int:
    """VmHWM, which counts pages of mapped files. With `reset` it begins again at what is resident now."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
