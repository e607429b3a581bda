"""Which parts of a chunk's documents go into each of its sequences. Pure functions of where the documents start.

Concatenation cuts the chunk every T tokens, wherever documents start. Best fit (Ding et al. 2024, "Fewer Truncations
Improve Language Modeling") places documents so that few are cut. Here the chunk's size determines the number of
sequences, so that any sequence can be found without reading the ones before it. Documents that cannot be placed whole
are cut to fill the remaining gaps. So no token is dropped, and only a corpus's last chunk, if it is short, is padded.
"""

from __future__ import annotations

import bisect

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Segments = list[list[tuple[int, int]]]
"""For each sequence, the token ranges [start, stop) of the chunk that it holds, one after another."""


def best_fit(starts: Ints, n_tokens: int, length: int) -> Segments:
    """Pack a chunk of `n_tokens` tokens, whose documents start at `starts`, into sequences of `length` tokens.

    A document that is longer than a sequence first fills whole sequences from its start. Its rest, like every shorter
    document, is placed where it leaves the least room, the longest first (best fit decreasing). Whole documents are
    placed before such rests, so that the pieces that must be cut to fill the gaps are mostly rests.
    """
    sequences: Segments = []
    rests: list[tuple[bool, int, int]] = []  # (was cut, -tokens, start)
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), n_tokens], strict=True):
        n_full = (stop - start) // length
        sequences += [[(start + i * length, start + (i + 1) * length)] for i in range(n_full)]
        start += n_full * length
        if stop > start:
            rests.append((n_full > 0, start - stop, start))
    n_open = -(-n_tokens // length) - len(sequences)
    bins: Segments = [[] for _ in range(n_open)]
    free = [(length, number) for number in range(n_open)]  # ascending
    postponed = []
    for _, minus_tokens, start in sorted(rests):
        tokens = -minus_tokens
        at = bisect.bisect_left(free, (tokens, 0))
        if at == len(free):
            postponed.append((start, start + tokens))
            continue
        room, number = free.pop(at)
        bins[number].append((start, start + tokens))
        bisect.insort(free, (room - tokens, number))
    for start, stop in postponed:  # fill the largest gaps first, so that there are few cuts
        while start < stop:
            room, number = free.pop()
            taken = min(room, stop - start)
            bins[number].append((start, start + taken))
            bisect.insort(free, (room - taken, number))
            start += taken
    return [*sequences, *(sorted(segments) for segments in bins)]


def concat(n_tokens: int, length: int, sequence: int) -> list[tuple[int, int]]:
    """The single token range of a sequence if the chunk is cut every `length` tokens."""
    return [(sequence * length, min((sequence + 1) * length, n_tokens))]
