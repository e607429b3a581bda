"""Hold real ranks at a place until the test has done what it wants to do there."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from support import ROOT


class Gate:
    """Ranks started with `env` wait at each place until it is opened.

    A place is `step-6`, before the first micro batch of step 6, when step 5 is recorded; or `rename-NAME`, before a
    file or folder gets its final name.
    """

    def __init__(self, folder: Path, *places: str) -> None:
        folder.mkdir()
        self._folder = folder
        self._closed = {place: (folder / place).open("w") for place in places}
        for file in self._closed.values():
            fcntl.flock(file, fcntl.LOCK_EX)
        shim = [str(ROOT / "tests" / "support" / "fault_shims" / "gate"), str(ROOT)]
        path = os.pathsep.join([*shim, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.env = {"PYTHONPATH": path, "GATE_FOLDER": str(folder), "GATE_PLACES": ",".join(places)}

    def reached(self, place: str, n_ranks: int = 2) -> bool:
        """Whether this number of ranks waits there."""
        return len(list(self._folder.glob(f"{place}-reached-*"))) == n_ranks

    def open(self, place: str) -> None:
        """Ranks go on from there, those that come later too."""
        self._closed.pop(place).close()
