"""Brings text into the form in which it is compared with evaluation items, and hashes all of it at once.

Only letters count. Case, variants of characters (NFKC), accents, look-alikes of Latin letters in Greek, Cyrillic and
Armenian, digits, punctuation, white space, tags and the addresses of links do not. Words and characters of scripts
without spaces are two streams: what stands between two Chinese characters in Latin letters, such as their sound in
brackets, does not part them.

numpy hashes all runs of a document at once. The hash of a run is a polynomial in its letters modulo 2**64, computed
from prefix sums. Two different runs have the same hash by accident in about 1 of 2**64 cases.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator
from itertools import compress, repeat
from operator import ne, not_
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint32]
Hashes = NDArray[np.uint64]

# Documents are hashed in pieces of this many characters, so that the arrays fit the processor's cache. Pieces overlap,
# so that an item that is shorter than the overlap lies within one piece.
PIECE_CHARS = 1 << 17
OVERLAP_CHARS = 1 << 12

_NO_SPACES = re.compile(  # Thai, Lao, Burmese, Khmer, kana, Han
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U000323ff]"
)
# What a copy may have around words, each with a string that must be in the text. Texts without it are not searched.
_MARKUP = (
    ("](", re.compile(r"\]\([^()\s]{0,500}(?: \"[^\"\n]{0,200}\")?\)")),
    ("://", re.compile(r"https?://[^\s<>()\[\]]{1,500}")),
    ("<", re.compile(r"</?[a-zA-Z][^<>\n]{0,300}>")),
)
# Both cases of a letter become the same Latin letter, so that text in these scripts is still compared in any case.
LOOK_ALIKES = str.maketrans(
    "авеһіјкӏмнорԛсѕтухѵԝԁαβεηικμνορτυχζօսցհոıɑɡøłđħŧ",
    "abehijklmhopqcstyxvwdabehikmvoptyxzoughniagoldht",
)
_SEPARATOR, _IGNORED, _WORD, _UNSPACED = 0, 1, 2, 3
_LIMIT = 0x32400  # characters from here on separate tokens
_MARKS = ("Mn", "Mc", "Me", "Cf")
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64


class Stream(NamedTuple):
    """The words of a piece of text, or its characters of scripts without spaces; both are called tokens."""

    begins: NDArray[np.int64]
    ends: NDArray[np.int64]
    """Where each token begins and ends in the text."""
    bounds: NDArray[np.int64]
    """Where each token begins among the letters of the stream, and the end of the last one."""
    sums: Hashes
    """Prefix sums of the polynomial over these letters."""

    def grams(self, n_letters: int) -> Hashes:
        """Hashes of the next `n_letters` letters from each token on. The last tokens have none, having too few."""
        count = int(np.searchsorted(self.bounds, len(self.sums) - 1 - n_letters, "right"))
        first = self.bounds[:count]
        return (self.sums[first + n_letters] - self.sums[first]) * powers(len(self.sums))[1][first]

    def tokens(self) -> NDArray[np.uint32]:
        """A hash of each token."""
        first, last = self.bounds[:-1], self.bounds[1:]
        return ((self.sums[last] - self.sums[first]) * powers(len(self.sums))[1][first]).astype(np.uint32)

    def joined(self, first: int, stop: int) -> int:
        """A hash of the letters of the tokens `first` to `stop`, as if they were one token."""
        begin, end = self.bounds[first], self.bounds[stop]
        difference = int(self.sums[end]) - int(self.sums[begin])
        return difference * int(powers(len(self.sums))[1][begin]) & 0xFFFFFFFF


class Streams(NamedTuple):
    """Both streams of a piece of text."""

    spaced: Stream
    unspaced: Stream | None
    """None where the text has no character of such a script."""


def streams_of(text: str) -> Iterator[tuple[int, Streams]]:
    """The streams of each piece of a text, with the offset of the piece."""
    for offset in range(0, max(1, len(text)), PIECE_CHARS):
        yield offset, _streams(text[offset : offset + PIECE_CHARS + OVERLAP_CHARS])


def _streams(text: str) -> Streams:
    tables = _tables()
    places = None
    is_ascii = text.isascii()
    if is_ascii:
        codes = np.frombuffer(text.encode("ascii"), np.uint8)
    else:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        codes = np.minimum(codes, np.uint32(_LIMIT))
    for sign, pattern in _MARKUP:
        if sign in text:
            codes = codes.copy()
            for found in pattern.finditer(text):
                codes[found.start() : found.end()] = 0x20
    if is_ascii:
        return Streams(_stream(tables.kinds[codes].nonzero()[0], codes, None), None)
    codes, places = _fold_codes(codes, tables)
    kinds = tables.kinds[codes]
    heard = (kinds != _IGNORED).nonzero()[0]
    if len(heard) < len(kinds):
        kinds, codes = kinds[heard], codes[heard]
        places = heard if places is None else places[heard]
    spaced = _stream((kinds == _WORD).nonzero()[0], codes, places)
    unspaced = (kinds == _UNSPACED).nonzero()[0]
    return Streams(spaced, _stream(unspaced, codes, places, single=True) if len(unspaced) else None)


def _stream(
    kept: NDArray[np.int64], codes: Codes, places: NDArray[np.int64] | None, single: bool = False
) -> Stream:
    """The stream of the characters at `kept`; with `single`, each of them is a token."""
    is_start = np.ones(len(kept), np.bool_)
    if not single:
        np.not_equal(kept[1:] - kept[:-1], 1, out=is_start[1:])
    starts = is_start.nonzero()[0]
    values = _tables().values[codes[kept]]
    values *= powers(len(values))[0][: len(values)]
    sums = np.zeros(len(kept) + 1, np.uint64)
    np.cumsum(values, out=sums[1:])
    bounds = np.full(len(starts) + 1, len(kept))
    bounds[:-1] = starts
    begins, ends = kept[starts], kept[bounds[1:] - 1]
    if places is not None:
        begins, ends = places[begins], places[ends]
    return Stream(begins, ends + 1, bounds, sums)


def _fold_codes(codes: Codes, tables: _Tables) -> tuple[Codes, NDArray[np.int64] | None]:
    """Folded characters, and the offset of each in the text where some characters become several."""
    single = tables.single[codes]
    if single.max(initial=0) <= _LIMIT:
        return single, None
    starts = tables.starts[codes]
    lengths = tables.starts[codes + np.uint32(1)] - starts
    places = np.repeat(np.arange(len(codes)), lengths)
    within = np.arange(len(places)) - (np.cumsum(lengths) - lengths)[places]
    return tables.folded[starts[places] + within], places


def _fold(character: str) -> str:
    """A character without marks and case, in NFKC: one or more characters, or a space for a sign."""
    apart = unicodedata.normalize("NFKD", character)
    bare = "".join(part for part in apart if unicodedata.category(part) not in _MARKS) or apart
    folded = unicodedata.normalize("NFKC", bare).casefold().translate(LOOK_ALIKES)
    return folded if len(folded) == 1 or any(map(str.isalpha, folded)) else " "


# Korean syllables are taken apart and put together again.
_SYLLABLES = frozenset(map(chr, range(0xAC00, 0xD7A4)))


class _Tables(NamedTuple):
    """Tables for folding, by code point."""

    single: NDArray[np.uint32]
    """Folded character of each code point, or a number above _LIMIT where there are several."""
    starts: NDArray[np.int64]
    """Index of its first folded character in `folded`; they end where those of the next code point start."""
    folded: NDArray[np.uint32]
    kinds: NDArray[np.uint8]
    values: Hashes


@functools.cache
def _tables() -> _Tables:
    """Build the tables at their first use, in about 0.1 s."""
    characters = list(map(chr, range(_LIMIT)))
    marks = set(compress(characters, map(_MARKS.__contains__, map(unicodedata.category, characters))))
    # The other characters are single letters and signs, which stay as they are: five of six.
    folding = marks.union(
        map(chr, LOOK_ALIKES), compress(characters, map(ne, characters, map(str.casefold, characters)))
    )
    is_apart = map(unicodedata.is_normalized, repeat("NFKD"), characters)
    folding.update(compress(characters, map(not_, is_apart)))
    parts = [*characters, " "]
    for character in folding - _SYLLABLES:
        parts[ord(character)] = _fold(character)
    folded = np.frombuffer("".join(parts).encode("utf-32-le", "surrogatepass"), np.uint32)
    lengths = np.fromiter(map(len, parts), np.int64, len(parts))
    starts = np.append(0, np.cumsum(lengths))
    single = np.where(lengths == 1, folded[np.minimum(starts[:-1], len(folded) - 1)], np.uint32(_LIMIT + 1))
    kinds = np.zeros(_LIMIT + 1, np.uint8)
    kinds[list(map(ord, marks))] = _IGNORED
    is_letter = np.fromiter(map(str.isalpha, characters), np.bool_, _LIMIT)
    kinds[:-1][is_letter] = _WORD
    kinds[list(map(ord, _NO_SPACES.findall("".join(compress(characters, is_letter)))))] = _UNSPACED
    values = np.arange(1, _LIMIT + 2, dtype=np.uint64)  # splitmix64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values *= np.uint64(_BASE)
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    values ^= values >> np.uint64(31)
    # ASCII text takes a shortcut that looks its letters up directly
    values[:128] = values[folded[:128]]
    return _Tables(single, starts, np.minimum(folded, np.uint32(_LIMIT)), kinds, values)


def powers(length: int) -> tuple[Hashes, Hashes]:
    """At least `length` powers of the base and of its inverse."""
    return _powers_to(max(18, length.bit_length()))


@functools.cache
def _powers_to(bits: int) -> tuple[Hashes, Hashes]:
    both = np.full((2, 1 << bits), [[_BASE], [pow(_BASE, -1, 1 << 64)]], np.uint64)
    both[:, 0] = 1
    powers, inverse = np.cumprod(both, axis=1)
    return powers, inverse
