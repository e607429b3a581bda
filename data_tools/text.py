"""What is done to each document's text: pure functions."""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

import xxhash

# C0 and C1 control characters except tab and newline, and halves of surrogate pairs, which no UTF-8 holds.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
# Han, kana, hangul, and the punctuation that goes with them.
_CJK = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]")


class Digest(NamedTuple):
    """128-bit hash of a text, as two independent 64-bit numbers."""

    order: int
    """Where the document stands in the corpus."""
    split: int
    """Whether the document is held out."""


def clean(text: str) -> str:
    """Unicode NFC, line ends as \\n, no byte-order mark, no control characters except \\n and \\t."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _CONTROL.sub("", text).lstrip("\ufeff")
    return unicodedata.normalize("NFC", text)


def digest(text: str) -> Digest:
    """The hash that duplicates share, and that fixes a document's place and split."""
    both = xxhash.xxh3_128_intdigest(text.encode())
    return Digest(both >> 64, both & (1 << 64) - 1)


def length_problem(text: str, min_chars: int, max_chars: int) -> str | None:
    """Why a document is dropped for its length, or None. Outer white space does not count."""
    length = len(text.strip())
    if length < min_chars:
        return "too_short"
    return "too_long" if length > max_chars else None


def count_cjk(text: str) -> tuple[int, int]:
    """Number of characters, white space aside, and how many of them are Chinese, Japanese or Korean."""
    return sum(map(len, text.split())), len(_CJK.findall(text))
