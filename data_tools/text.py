"""Pure functions on the text of a document: cleaning, hashing, measuring."""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

import xxhash

# C0 and C1 control characters except tab and newline, and halves of surrogate pairs, which UTF-8 cannot encode.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
# Han, kana and hangul, with their punctuation.
_CJK = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]")


class Digest(NamedTuple):
    """128-bit hash of a text, split into two independent 64-bit numbers."""

    order: int
    """Decides the document's position in the corpus."""
    split: int
    """Decides whether the document is held out."""


def clean(text: str) -> str:
    """Normalize to Unicode NFC and \\n line ends; drop the byte-order mark and control characters but \\n and \\t."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _CONTROL.sub("", text).lstrip("\ufeff")
    return unicodedata.normalize("NFC", text)


def digest(text: str) -> Digest:
    """The hash of a text: equal texts share it, and it decides a document's position and split."""
    both = xxhash.xxh3_128_intdigest(text.encode())
    return Digest(both >> 64, both & (1 << 64) - 1)


def length_problem(text: str, min_chars: int, max_chars: int) -> str | None:
    """The reason for dropping a document for its length, or None. Leading and trailing white space does not count."""
    length = len(text.strip())
    if length < min_chars:
        return "too_short"
    return "too_long" if length > max_chars else None


def count_cjk(text: str) -> tuple[int, int]:
    """Number of characters that are not white space, and how many of them are Chinese, Japanese or Korean."""
    return sum(map(len, text.split())), len(_CJK.findall(text))
