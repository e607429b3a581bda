"""Runs launch/train.py, and writes the names of all modules that are loaded after the first step to a file."""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from pretrain.reliability.watchdog import Watchdog

_started = Watchdog.started


def started(self: Watchdog) -> None:
    """Write the names of the modules, at the first step only."""
    if not self._started:
        path = Path(os.environ["MODULES_OF_RANK"] + os.environ["RANK"])
        path.write_text("\n".join(sorted(sys.modules)))
    _started(self)


Watchdog.started = started  # type: ignore[method-assign]
runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")
