"""Packing: every token of a chunk in one sequence, and few documents cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.packing import Segments, best_fit, concat


@st.composite
def chunks(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    """Where documents start, tokens, tokens per sequence."""
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=30))
    starts = np.cumsum([0, *lengths])
    return starts[:-1], int(starts[-1]), draw(st.sampled_from([1, 2, 3, 8, 16]))


def documents_cut(segments: Segments, starts: np.ndarray, n_tokens: int) -> set[int]:
    """First tokens of the documents that are in more than one piece."""
    begins = {start for sequence in segments for start, _ in sequence}
    ends = [*starts[1:].tolist(), n_tokens]
    return {
        start
        for start, end in zip(starts.tolist(), ends, strict=True)
        if any(start < begin < end for begin in begins)
    }


@given(chunk=chunks())
def test_every_token_is_in_one_sequence(chunk: tuple[np.ndarray, int, int]) -> None:
    starts, n_tokens, length = chunk
    sequences = best_fit(starts, n_tokens, length)
    assert len(sequences) == -(-n_tokens // length), "as many as without packing: the order counts on it"
    segments = sorted(segment for sequence in sequences for segment in sequence)
    assert [t for start, stop in segments for t in range(start, stop)] == list(range(n_tokens))
    borders = set(starts.tolist())
    for sequence in sequences:
        assert 0 < sum(stop - start for start, stop in sequence) <= length
        for start, stop in sequence:
            assert not any(start < border < stop for border in borders), "a segment is of one document"


@given(chunk=chunks())
def test_what_fits_whole_beside_the_others_is_not_cut(chunk: tuple[np.ndarray, int, int]) -> None:
    """With documents of one length that divides a sequence nothing needs to be cut, wherever the chunk begins."""
    _, n_tokens, length = chunk
    part = max(d for d in range(1, length + 1) if length % d == 0 and d <= max(1, length // 2))
    first = n_tokens % part or part
    starts = np.array([0, *range(first, 8 * length, part)])
    assert documents_cut(best_fit(starts, 8 * length, length), starts, 8 * length) == set()


def test_fewer_documents_are_cut_than_by_concatenation() -> None:
    random = np.random.default_rng(0)
    starts = np.cumsum([0, *random.lognormal(6, 1, 600).astype(int) + 2])
    n_tokens, length = 1 << 18, 2048
    starts = starts[starts < n_tokens]
    packed = documents_cut(best_fit(starts, n_tokens, length), starts, n_tokens)
    cut = [concat(n_tokens, length, sequence) for sequence in range(n_tokens // length)]
    too_long = {int(s) for s, n in zip(starts, np.diff([*starts, n_tokens]), strict=True) if n > length}
    assert packed == too_long, "only what is longer than a sequence"
    assert len(documents_cut(cut, starts, n_tokens)) > 5 * len(packed)


@pytest.mark.parametrize(("sequence", "expected"), [(0, [(0, 8)]), (2, [(16, 20)])])
def test_concatenation_ends_with_the_chunk(sequence: int, expected: list[tuple[int, int]]) -> None:
    assert concat(20, 8, sequence) == expected
