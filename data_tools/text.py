"""Pure functions on the text of a document: cleaning, hashing, measuring."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

# C0 and C1 control characters except tab and newline, and halves of surrogate pairs, which UTF-8 cannot encode.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
# Han, kana and hangul, with their punctuation.
_CJK = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]+")


def _marks(codes: Iterable[int]) -> str:
    """The combining marks among ascending code points, as the inside of a character class."""
    ranges: list[list[int]] = []
    for code in codes:
        if unicodedata.category(chr(code)).startswith("M"):
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


_BASIC_MARKS = _marks(range(0x300, 0x10000))
MARKS = _BASIC_MARKS + _marks([*range(0x10000, 0x20000), *range(0xE0100, 0xE01F0)])
"""Combining marks, as the inside of a character class: vowel signs of Hindi, points of Hebrew, accents."""
WORD = rf"\w{MARKS}\u200c\u200d"
"""What a word may contain, as the inside of a character class: letters, digits, underscores, marks, and the joiners
that Persian and the scripts of India write inside words. `\\w` alone ends a Hindi word at every vowel sign. A word
begins with a `\\w`: `rf"\\w[{WORD}]*"`."""
WORD_START = rf"\b(?<![{_BASIC_MARKS}\u200c\u200d])"
"""The start of a word; `\\b` also lies between a mark and a letter. Marks beyond the basic plane would cost three times
as much and are left out."""
WORD_END = rf"(?![{WORD}])"
"""The end of a word, after a letter, digit or mark; `\\b` also lies between a letter and its mark."""
UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9d"
    r"\U00020000-\U0003ffff"
)
"""Scripts without spaces between words, as the inside of a character class: Thai, Lao, Burmese, Khmer, kana, Han."""
# The exact ranges beyond the basic plane are many, and each is tried for every character: 30 times slower.
_MAYBE_MARK = re.compile(rf"[{_BASIC_MARKS}\u200c\u200d\U00010000-\U000effff]")


def has_marks(text: str) -> bool:
    """Whether a text may contain marks or joiners. If not, `\\w` is as good as `WORD`, and twice as fast."""
    return not text.isascii() and _MAYBE_MARK.search(text) is not None


def clean(text: str) -> str:
    """Normalize to Unicode NFC and \\n line ends; drop the byte-order mark and control characters but \\n and \\t."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _CONTROL.sub("", text).lstrip("\ufeff")
    return unicodedata.normalize("NFC", text)


def clean_all(texts: Sequence[str]) -> Sequence[str]:
    """`clean` of each text. Most texts are clean already, which is seen faster of many at once."""
    together = "\n".join(texts)  # no character forms another one with a line feed
    if "\ufeff" in together or _CONTROL.search(together) or not unicodedata.is_normalized("NFC", together):
        return [clean(text) for text in texts]
    return texts


def length_problems(texts: Sequence[str], min_chars: int, max_chars: int) -> list[str | None]:
    """The reason for dropping each document for its length, or None. White space around a text does not count."""
    return [
        None if min_chars <= length <= max_chars else "too_short" if length < min_chars else "too_long"
        for length in map(len, map(str.strip, texts))
    ]


def count_cjk(text: str) -> tuple[int, int]:
    """Number of characters that are not white space, and how many of them are Chinese, Japanese or Korean."""
    return sum(map(len, text.split())), sum(map(len, _CJK.findall(text)))
