"""Which parts of a chunk's documents go into each of its sequences. Pure functions of where the documents are.

Concatenation cuts the chunk every T tokens, wherever documents start. Best fit (Ding et al. 2024, "Fewer Truncations
Improve Language Modeling") places documents so that few are cut. Here the chunk's size determines the number of
sequences, so that any sequence can be found without reading the ones before it. Documents that cannot be placed whole
are cut to fill the remaining gaps. So no token is dropped, and only a corpus's last chunk, if it is short, is padded.

A corpus of whole documents was packed when it was prepared (`Packed` in its manifest), so that none has to be cut. Its
sequences end with filler, which is left out here: the reader pads them.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # loader workers start faster without it
    from pretrain.corpus.shards import Corpus

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


def ranges_of(corpus: Corpus, chunk: int, length: int, sequence: int) -> list[tuple[int, int]]:
    """The token ranges of a sequence of a chunk whose documents stay in their order. Raises CorruptShardError.

    For a corpus of whole documents, these are the documents of one or more packed sequences, without their filler.
    """
    n_tokens, packed_length = corpus.tokens_in(chunk), corpus.manifest.sequence_tokens
    if packed_length is None:
        return concat(n_tokens, length, sequence)
    return whole(corpus.documents(chunk).ends, n_tokens, length, sequence, packed_length)


def whole(ends: Ints, n_tokens: int, length: int, sequence: int, packed_length: int) -> list[tuple[int, int]]:
    """The token ranges of a sequence that joins packed sequences of `packed_length` tokens.

    `ends` are where the documents of the chunk end. `length` is a multiple of `packed_length`.
    """
    begins = range(sequence * length, min((sequence + 1) * length, n_tokens), packed_length)
    return [
        (begin, int(ends[ends.searchsorted(begin + packed_length, side="right") - 1])) for begin in begins
    ]


def concat(n_tokens: int, length: int, sequence: int) -> list[tuple[int, int]]:
    """The single token range of a sequence if the chunk is cut every `length` tokens."""
    return [(sequence * length, min((sequence + 1) * length, n_tokens))]
