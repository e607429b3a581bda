"""The form in which every topic returns its measured values, and how texts are drawn from a corpus."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Figure(NamedTuple):
    """One measured value, with its goal and, where a peer does the same work, the value of that peer."""

    name: str
    """What was measured, such as `encyclopedia articles dropped, Polish`."""
    ours: float
    """The value, as a fraction or a ratio."""
    counted: str
    """Numerator and denominator, such as `3 of 1013`."""
    goal: str = ""
    """What the value should satisfy, such as `<= 0.03`; empty where there is no goal."""
    theirs: float | str | None = None
    """The same value of datatrove with its default settings, or why there is none; None where it was not measured."""


def records(path: Path) -> Iterator[dict[str, str]]:
    """The records of a JSONL file. Raises FileNotFoundError, which names the missing file."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def sample(path: Path, count: int, seed: int = 0) -> list[dict[str, str]]:
    """`count` records of a JSONL file, or all if there are fewer, chosen by `seed` alone."""
    every = list(records(path))
    return random.Random(seed).sample(every, min(count, len(every)))
