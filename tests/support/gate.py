"""Hold real ranks at a place in the program until the test has acted."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from support import ROOT


class Gate:
    """Makes ranks that are started with `env` wait at each place until the test opens it.

    The place `step-6` is before the first micro batch of step 6, after step 5 has been recorded. The place
    `rename-NAME` is before a file or folder is renamed to NAME.
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
        """Whether this number of ranks has arrived at the place."""
        return len(list(self._folder.glob(f"{place}-reached-*"))) == n_ranks

    def open(self, place: str) -> None:
        """Let ranks continue from the place, including ranks that arrive later."""
        self._closed.pop(place).close()
