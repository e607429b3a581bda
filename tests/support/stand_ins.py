"""Stand-ins for programs that exist only on machines with a GPU."""

from __future__ import annotations

from pathlib import Path


def write_nvidia_smi(folder: Path, text: str, status: int = 0) -> Path:
    """Write a stand-in for nvidia-smi that lists a GPU and answers any query with `text`. Returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "nvidia-smi"
    script.write_text(
        f"#!/bin/sh\n[ \"$1\" = -L ] && echo 'GPU 0: a stand-in'\n[ \"$1\" = -L ] || echo '{text}'\nexit {status}\n"
    )
    script.chmod(0o755)
    return folder
