"""Chooses an order in which whole documents fill sequences with little filler."""

from __future__ import annotations

import bisect

import numpy as np


def best_fit(sizes: np.ndarray, sequence_tokens: int) -> np.ndarray:
    """An order of documents, as indices into `sizes`, for a writer that fills one sequence after another.

    `sizes` are numbers of tokens, at most `sequence_tokens` each. The longest document that is left is put into the
    fullest sequence that has room for it, or begins one (best fit decreasing): at most 11/9 times as many sequences as
    are needed, and 2/3 of one more (Dósa 2007, for first fit decreasing, whose bound it shares). The longest first
    would also sort the corpus by length. So the sequences get the order of the documents that began them, and the
    documents of a sequence their own, both of which the hashes of their content decide.
    """
    sequences: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, number) of each sequence that is not full, ascending
    for row in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[row])
        at = bisect.bisect_left(free, (size, 0))
        room, number = free.pop(at) if at < len(free) else (sequence_tokens, len(sequences))
        if number == len(sequences):
            sequences.append([])
        sequences[number].append(row)
        if room > size:
            bisect.insort(free, (room - size, number))
    return np.array([row for rows in sorted(sequences) for row in sorted(rows)], np.int64)
