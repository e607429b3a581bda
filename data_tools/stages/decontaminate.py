"""Finds text of evaluation sets in the corpus by shared n-grams, and drops the document or cuts the text out.

Tokens are words of letters and digits, or single characters in scripts without spaces. Case, variants of characters
(NFKC), accents, punctuation and white space do not count. An n-gram is a run of 13 tokens, as in Brown et al. 2020
("Language Models are Few-Shot Learners", appendix C), or of 20 where the evaluation item is Chinese: a Chinese word
has about 1.5 characters, so both hold about as much text.

numpy hashes all runs of a document at once. The hash of a run is a polynomial in its characters modulo 2**64, computed
from prefix sums. Two different runs have the same hash by accident in about 1 of 2**64 cases, so hits are not checked
again.
"""

from __future__ import annotations

import functools
import json
import os
import re
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.reading.evaluation_sets import read_items
from data_tools.record import Record
from pretrain.config.texts import PathText
from pretrain.errors import ConfigError
from pretrain.files import open_regular, written_atomically

Codes = NDArray[np.uint32]
Hashes = NDArray[np.uint64]

# Documents are hashed in pieces of this many characters, so that the arrays fit the processor's cache. Pieces overlap,
# so that a run shorter than the overlap lies within one piece.
_PIECE_CHARS = 1 << 17
_OVERLAP_CHARS = 1 << 12
_MAX_CUTS = 10


class DecontaminateMode(Enum):
    drop = "drop"
    """The document is dropped."""
    cut = "cut"
    """Shared text is cut out, with a margin; the document is dropped if little remains or it needs over 10 cuts."""
    annotate = "annotate"
    """Hits are counted, and nothing is changed."""


@dataclass(kw_only=True, slots=True)
class DecontaminateConfig:
    """Evaluation sets that must not be in the corpus, and when text counts as shared with them."""

    files: list[PathText] = field(default_factory=list)
    """Files or URLs of JSON lines (.jsonl) or plain text with an item per line, also as .gz or .zst. Each file is a
    set, named by the file name up to its first dot."""
    fields: list[str] = field(default_factory=lambda: ["question", "answer", "text"])
    """Fields of a JSON line whose strings are looked for, also those inside lists and objects."""
    index: PathText | None = None
    """File written by build_index; null: every process builds the index at its first document."""
    mode: DecontaminateMode = DecontaminateMode.drop
    ngram_words: int = 13
    """Length of a shared run in words."""
    ngram_chars: int = 20
    """Length of a shared run in characters, for items that are at least half in a script without spaces."""
    min_words: int = 8
    """An item shorter than ngram_words is looked for as a whole if it has at least this many words; otherwise it is
    ignored."""
    min_chars: int = 12
    """Same as min_words in characters, for items in a script without spaces."""
    margin_chars: int = 200
    """Characters that `cut` removes on each side of shared text (Brown et al. 2020: 200)."""
    min_piece_chars: int = 200
    """Shorter pieces between cuts are removed too (Brown et al. 2020: 200)."""

    def __post_init__(self) -> None:
        for short, long in (("min_words", "ngram_words"), ("min_chars", "ngram_chars")):
            low, high = getattr(self, short), getattr(self, long)
            if not 2 <= low <= high <= 100:
                raise ConfigError(
                    f"curation.decontaminate.{short}={low} and {long}={high} must satisfy 2 <= {short} <= {long} <= 100"
                )
        for name in ("margin_chars", "min_piece_chars"):
            if getattr(self, name) < 0:
                raise ConfigError(f"curation.decontaminate.{name}={getattr(self, name)} is negative")
        names = [_set_name(path) for path in self.files]
        if len(set(names)) < len(names):
            raise ConfigError(f"curation.decontaminate.files={self.files} has two files of the same name")


class Hit(NamedTuple):
    """Text that a document shares with an evaluation set."""

    start: int
    end: int
    set_name: str


class Index(NamedTuple):
    """Hashes of all runs of the evaluation sets."""

    hashes: Hashes
    """Hashes of the runs, sorted; a run that two sets share is listed twice."""
    sets: NDArray[np.uint16]
    """Set of each hash, as an index into the names."""
    names: list[str]
    items: list[int]
    """Number of items of each set."""
    too_short: list[int]
    """Number of items of each set that are too short to be looked for."""
    lengths: list[list[int]]
    """Lengths of the runs in tokens, first of items counted in words, then of items counted in characters."""
    openings: Hashes
    """Hashes of the first min_words or min_chars tokens of every run, sorted."""

    def write(self, path: str | os.PathLike[str], parameters: str) -> None:
        """Write one .npz file without pickle; the same content gives the same bytes."""
        head = [parameters, self.names, self.items, self.too_short, self.lengths]
        with written_atomically(Path(path), durable=True) as file:
            arrays = {"hashes": self.hashes, "sets": self.sets, "openings": self.openings}
            np.savez(file, allow_pickle=False, head=np.array(json.dumps(head)), **arrays)

    @classmethod
    def read(cls, path: str | os.PathLike[str], parameters: str) -> Index:
        """Read an index. Raises ConfigError where the file is not one, or was built with other parameters."""
        try:
            with open_regular(path) as file:
                _check_stored(file)
                with np.load(file, allow_pickle=False) as arrays:
                    built_with, *head = json.loads(str(arrays["head"]))
                    hashes, sets, openings = arrays["hashes"], arrays["sets"], arrays["openings"]
        except (OSError, ValueError, KeyError, MemoryError, RecursionError, zipfile.BadZipFile) as error:
            raise ConfigError(f"curation.decontaminate.index={path} cannot be read: {error}") from error
        if built_with != parameters:
            raise ConfigError(
                f"curation.decontaminate.index={path} was built with {built_with}, but now it is {parameters}"
            )
        return cls(hashes, sets, *head, openings)


class DecontaminateStage:
    """Drops documents as `contaminated`; `decontaminate.<set>` counts the pieces of text shared with a set."""

    name = "decontaminate"

    def __init__(self, config: DecontaminateConfig) -> None:
        self._config = config
        self._index: Index | None = None
        self._table: NDArray[np.bool_] = np.zeros(1, bool)

    def process(self, record: Record) -> str | None:
        hits = self.find(record.text)
        for hit in hits:
            record.count(f"decontaminate.{hit.set_name}")
        if not hits or self._config.mode is DecontaminateMode.annotate:
            return None
        if self._config.mode is DecontaminateMode.cut and (rest := self._cut(record.text, hits)):
            record.text = rest
            return None
        return "contaminated"

    def find(self, text: str) -> list[Hit]:
        """All shared text, ordered by set and then from left to right; overlapping runs of one set are one hit."""
        if self._index is None:
            self._load()
        assert self._index is not None
        found: dict[int, list[tuple[int, int]]] = {}
        if len(self._index.hashes):
            for offset, tokens in tokenize(text):
                for begin, end, set_number in self._lookup(tokens):
                    found.setdefault(set_number, []).append((offset + begin, offset + end))
        names = self._index.names
        return [Hit(*span, names[number]) for number in sorted(found) for span in merge(found[number])]

    def _lookup(self, tokens: Tokens) -> Iterator[tuple[int, int, int]]:
        """Places of the runs that are in the index, with the numbers of their sets."""
        assert self._index is not None
        index, config = self._index, self._config
        shift = np.uint64(65 - len(self._table).bit_length())
        for opening, lengths, present in (
            (config.min_words, index.lengths[0], True),
            (config.min_chars, index.lengths[1], tokens.unspaced),
        ):
            # Few runs have the beginning of a run in the index, so this table rules out nearly all of them.
            hashes = tokens.runs(opening) if lengths and present else index.hashes[:0]
            maybe = np.flatnonzero(self._table[hashes >> shift])
            found = np.searchsorted(index.openings, hashes[maybe]).clip(max=len(index.openings) - 1)
            maybe = maybe[index.openings[found] == hashes[maybe]]
            for length in lengths if len(maybe) else ():
                at = maybe[maybe + length < len(tokens.bounds)]
                hashes = tokens.runs(length, at)
                left = np.searchsorted(index.hashes, hashes, "left")
                right = np.searchsorted(index.hashes, hashes, "right")
                for hit in np.flatnonzero(left < right).tolist():
                    first, last = at[hit], at[hit] + length - 1
                    for number in index.sets[left[hit] : right[hit]].tolist():
                        yield int(tokens.begins[first]), int(tokens.ends[last]), number

    def _cut(self, text: str, hits: list[Hit]) -> str:
        """The text without the hits; empty where the document should be dropped."""
        margin = self._config.margin_chars
        cuts = merge((max(0, hit.start - margin), hit.end + margin) for hit in hits)
        if len(cuts) > _MAX_CUTS:
            return ""
        edges = [0, *(edge for cut in cuts for edge in cut), len(text)]
        pieces = [text[start:end].strip() for start, end in zip(edges[::2], edges[1::2], strict=True)]
        return "\n\n".join(piece for piece in pieces if len(piece) >= max(1, self._config.min_piece_chars))

    def _load(self) -> None:
        config = self._config
        self._index = Index.read(config.index, _parameters(config)) if config.index else collect(config)
        openings = self._index.openings
        bits = min(26, max(10, (16 * len(openings)).bit_length()))  # 64 MiB at most
        self._table = np.zeros(1 << bits, bool)
        self._table[openings >> np.uint64(64 - bits)] = True


def build_index(config: DecontaminateConfig, path: str | os.PathLike[str]) -> Index:
    """Read the evaluation files and write their index into one file. Raises ConfigError."""
    index = collect(config)
    index.write(path, _parameters(config))
    return index


def collect(config: DecontaminateConfig) -> Index:
    """Build the index. Raises ConfigError where a file cannot be read or has nothing to look for."""
    hashes: list[Hashes] = []
    openings: list[Hashes] = [np.empty(0, np.uint64)]
    items_of, short_of = [], []
    lengths: tuple[set[int], set[int]] = (set(), set())
    for path in config.files:
        own, items, found = [openings[0]], 0, 0
        for texts in read_items(path, config.fields):
            before = len(own)
            for tokens in (tokens for text in texts for _, tokens in tokenize(text)):
                count = len(tokens.begins)
                unspaced = 2 * tokens.unspaced >= count
                shortest = config.min_chars if unspaced else config.min_words
                length = min(count, config.ngram_chars if unspaced else config.ngram_words)
                if length >= shortest:
                    lengths[unspaced].add(length)
                    own.append(tokens.runs(length))
                    openings.append(tokens.runs(shortest)[: len(own[-1])])
            items += 1
            found += len(own) > before
        if not items:
            raise ConfigError(f"curation.decontaminate.files: {path} has none of the fields {config.fields}")
        items_of.append(items)
        short_of.append(items - found)
        hashes.append(np.unique(np.concatenate(own)))
    every = np.concatenate(hashes) if hashes else openings[0]
    sets = np.repeat(np.arange(len(hashes), dtype=np.uint16), [len(own) for own in hashes])
    order = np.argsort(every, kind="stable")
    names = [_set_name(path) for path in config.files]
    by_kind = [sorted(each) for each in lengths]
    return Index(
        every[order], sets[order], names, items_of, short_of, by_kind, np.unique(np.concatenate(openings))
    )


def _check_stored(file: IO[bytes]) -> None:
    """Refuse compressed arrays, which `Index.write` never writes. Raises ValueError and BadZipFile."""
    for info in zipfile.ZipFile(file).infolist():
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{info.filename} in it is compressed, which build_index never does")
    file.seek(0)


def _set_name(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1].split(".")[0]


def _parameters(config: DecontaminateConfig) -> str:
    """The options that an index depends on, besides the content of the files."""
    names = [_set_name(path) for path in config.files]
    lengths = [config.ngram_words, config.ngram_chars, config.min_words, config.min_chars]
    return json.dumps({"format": 1, "sets": names, "fields": list(config.fields), "lengths": lengths})


def merge(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge spans that overlap or touch, and sort them from left to right."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


# --- tokens and hashes ---

_SEPARATOR, _IGNORED, _WORD, _UNSPACED = 0, 1, 2, 3
_NO_SPACES = re.compile(  # Thai, Lao, Burmese, Khmer, kana, Han
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U000323ff]"
)
_LIMIT = 0x32400  # characters from here on separate tokens
_MARKS = ("Mn", "Mc", "Me", "Cf")
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_FIRST_OF_TOKEN = np.uint64(0xD1B54A32D192ED03)


class Tokens(NamedTuple):
    """The tokens of a piece of text: where each begins and ends, and the sums that hashes are computed from."""

    begins: NDArray[np.int64]
    ends: NDArray[np.int64]
    bounds: NDArray[np.int64]
    """Where each token begins among the characters that count, and the end of the last one."""
    sums: Hashes
    """Prefix sums of the polynomial over these characters."""
    unspaced: int
    """Number of tokens that are characters of scripts without spaces."""

    def runs(self, length: int, at: NDArray[np.int64] | None = None) -> Hashes:
        """Hashes of all runs of `length` tokens, or of those that begin at the tokens `at`."""
        first = self.bounds[:-length] if at is None else self.bounds[at]
        last = self.bounds[length:] if at is None else self.bounds[at + length]
        return (self.sums[last] - self.sums[first]) * _powers(len(self.sums))[1][first]


def tokenize(text: str) -> Iterator[tuple[int, Tokens]]:
    """The tokens of each piece of a text, with the offset of the piece."""
    for offset in range(0, max(1, len(text)), _PIECE_CHARS):
        yield offset, _tokenize(text[offset : offset + _PIECE_CHARS + _OVERLAP_CHARS])


def _tokenize(text: str) -> Tokens:
    tables = _tables()
    places = None
    if text.isascii():
        codes = np.frombuffer(text.encode("ascii"), np.uint8)
    else:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        codes, places = _fold_codes(np.minimum(codes, np.uint32(_LIMIT)), tables)
    kinds = tables.kinds[codes]
    if not text.isascii():
        heard = np.flatnonzero(kinds != _IGNORED)
        if len(heard) < len(kinds):
            kinds, codes = kinds[heard], codes[heard]
            places = heard if places is None else places[heard]
    kept = np.flatnonzero(kinds)
    first = np.diff(kept, prepend=-2) != 1
    unspaced = kinds[kept] == _UNSPACED
    count = int(np.count_nonzero(unspaced))
    if count:
        first |= unspaced
        first[1:] |= unspaced[:-1]
    starts = np.flatnonzero(first)
    values = tables.values[codes[kept]]
    values[starts] += _FIRST_OF_TOKEN
    values *= _powers(len(values))[0][: len(values)]
    sums = np.zeros(len(kept) + 1, np.uint64)
    np.cumsum(values, out=sums[1:])
    bounds = np.append(starts, len(kept))
    begins, ends = kept[starts], kept[bounds[1:] - 1]
    if places is not None:
        begins, ends = places[begins], places[ends]
    return Tokens(begins, ends + 1, bounds, sums, count)


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
    folded = unicodedata.normalize("NFKC", bare).casefold()
    return folded if len(folded) == 1 or any(map(str.isalnum, folded)) else " "


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
    """Build the tables at their first use, in about 0.3 s."""
    parts = [_fold(chr(code)) for code in range(_LIMIT)] + [" "]
    folded = np.frombuffer("".join(parts).encode("utf-32-le", "surrogatepass"), np.uint32)
    starts = np.cumsum([0, *map(len, parts)])
    single = np.array([ord(part) if len(part) == 1 else _LIMIT + 1 for part in parts], np.uint32)
    kinds = np.zeros(_LIMIT + 1, np.uint8)
    for character in map(chr, range(_LIMIT)):
        if character.isalnum():
            kinds[ord(character)] = _UNSPACED if _NO_SPACES.match(character) else _WORD
        elif unicodedata.category(character) in _MARKS:
            kinds[ord(character)] = _IGNORED
    values = np.arange(1, _LIMIT + 2, dtype=np.uint64)  # splitmix64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values *= np.uint64(_BASE)
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    values ^= values >> np.uint64(31)
    # ASCII text takes a shortcut that looks its letters up directly
    values[:128] = values[folded[:128]]
    return _Tables(single, starts, np.minimum(folded, np.uint32(_LIMIT)), kinds, values)


def _powers(length: int) -> tuple[Hashes, Hashes]:
    """At least `length` powers of the base and of its inverse."""
    return _powers_to(max(18, length.bit_length()))


@functools.cache
def _powers_to(bits: int) -> tuple[Hashes, Hashes]:
    both = np.full((2, 1 << bits), [[_BASE], [pow(_BASE, -1, 1 << 64)]], np.uint64)
    both[:, 0] = 1
    powers, inverse = np.cumprod(both, axis=1)
    return powers, inverse
