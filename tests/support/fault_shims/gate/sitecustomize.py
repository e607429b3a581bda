"""Makes ranks wait at chosen places until the test lets them continue. Tests put this folder on PYTHONPATH.

A test that acts "after step 5" then does so on any machine, however busy it is and however short the steps are. See
tests/support/gate.py.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

from pretrain.reliability import heartbeat

_FOLDER = Path(os.environ["GATE_FOLDER"])
_PLACES = set(os.environ["GATE_PLACES"].split(","))
_mark, _rename = heartbeat.mark, os.rename


def _wait_at(place: str) -> None:
    if place not in _PLACES:
        return
    (_FOLDER / f"{place}-reached-{os.environ.get('RANK', '0')}").touch()
    with (_FOLDER / place).open() as file:
        fcntl.flock(
            file, fcntl.LOCK_SH
        )  # held by the test; a clock would not do, because some tests change it


def _gated_mark(phase: str, step: int | None = None, last_words: str = "") -> None:
    _mark(phase, step, last_words)
    if phase == "micro batch":
        _wait_at(f"step-{step}")


def _gated_rename(source: Any, target: Any, **options: Any) -> None:
    _wait_at(f"rename-{Path(target).name}")
    _rename(source, target, **options)


heartbeat.mark = _gated_mark
os.rename = _gated_rename
