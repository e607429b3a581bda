"""Hashes of the runs of words or characters of a text, to look for exact copies of them elsewhere."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from data_tools.stages.decontamination.canonical import Hashes, Stream, powers, streams_of

WORDS, CHARACTERS = 13, 20
"""Length of a run. Characters are those of scripts without spaces."""
_FEWEST = (8, 12)  # words, or characters, of a shorter text that is looked for as a whole


def runs(text: str, keys: Iterable[int] | None = None) -> dict[int, Hashes]:
    """The hashes of all runs of a text by their length, which is negative for characters.

    With `keys`, these are the lengths. Without, the text has the usual ones, or that of a shorter text itself.
    """
    found: dict[int, list[Hashes]] = {}
    for _, streams in streams_of(text):
        for stream, is_unspaced in ((streams.spaced, False), (streams.unspaced, True)):
            if stream is None:
                continue
            sign, most = (-1, CHARACTERS) if is_unspaced else (1, WORDS)
            own = [sign * min(most, len(stream.begins))] if len(stream.begins) >= _FEWEST[is_unspaced] else []
            for key in own if keys is None else (key for key in keys if key * sign > 0):
                found.setdefault(key, []).append(_hashes(stream, abs(key)))
    return {key: np.unique(np.concatenate(parts)) for key, parts in found.items()}


def _hashes(stream: Stream, n_tokens: int) -> Hashes:
    first, last = stream.bounds[:-n_tokens], stream.bounds[n_tokens:]
    return (stream.sums[last] - stream.sums[first]) * powers(len(stream.sums))[1][first]
