"""Hashes of the runs of words or characters of a text, to look for exact copies of them elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from data_tools.stages.decontamination.canonical import Hashes, Stream, powers, streams_of

WORDS, CHARACTERS = 13, 20
"""Length of a run. Characters are those of scripts without spaces."""
_FEWEST = (8, 12)  # words, or characters, of a shorter text that is looked for as a whole


# Between texts: a word and a Han character that no text has, so that a run over the end of a text is like no other.
_WORD_BETWEEN, _CHARACTER_BETWEEN = "\nzqxjkvzqxjkv\n", "\U0003134a\n"
_BLOCK_CHARS = 1 << 16


def blocks(texts: Iterable[str]) -> Iterator[str]:
    """Texts joined to larger ones with the same runs, which are hashed several times faster than many short ones."""
    block, n_chars = list[str](), 0
    for text in texts:
        block.append(text)
        n_chars += len(text)
        if n_chars >= _BLOCK_CHARS:
            yield _joined(block)
            block, n_chars = [], 0
    if block:
        yield _joined(block)


def _joined(texts: list[str]) -> str:
    between = _WORD_BETWEEN + ("" if all(map(str.isascii, texts)) else _CHARACTER_BETWEEN)
    return between.join(texts)


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
    return {key: np.concatenate(parts) for key, parts in found.items()}


def _hashes(stream: Stream, n_tokens: int) -> Hashes:
    first, last = stream.bounds[:-n_tokens], stream.bounds[n_tokens:]
    return (stream.sums[last] - stream.sums[first]) * powers(len(stream.sums))[1][first]
