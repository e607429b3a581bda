"""Finds text of evaluation sets in the corpus, also after edits, and drops the document or cuts the text out.

Text is compared in the form of `canonical`. Seeds, which are runs of a few letters, lead to the units of evaluation
items that a document may hold (`evaluation_index`). Where the tokens of a unit then stand in the document in about the
same places, the two are aligned, and the document is hit if one of these holds:

- a run of 13 words or 20 Chinese characters is the same;
- nearly all of a text of the item is there, such as 7 of its 8 words;
- what is there carries at least 28 % of the information of the text, and enough to be no accident.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from enum import Enum
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.reading.evaluation_sets import FIELDS, evaluation_files, read_items, set_name
from data_tools.record import Record
from data_tools.stages.decontamination.canonical import Stream, streams_of
from data_tools.stages.decontamination.evaluation_index import (
    GRAM_LETTERS,
    UNIT_TOKENS,
    Index,
    IndexBuilder,
    joined_hash,
)
from pretrain.config.texts import PathText
from pretrain.errors import ConfigError

_MAX_CUTS = 10

# What the part of a unit that a document holds must carry, in bits; a word of English text has about 6.5. It is the
# share of the unit, but at least _ENOUGH_BITS (2 more for each doubling of the units above _FEW_UNITS) and at most
# _SURE_BITS. With these values, 96 % of the last thirds of passages of 26 to 60 words are found.
_ENOUGH_BITS, _FEW_UNITS = 48.0, 2000
_ENOUGH_TOKENS = (7, 11)  # at least, because a few names say much
_SURE_BITS = 96.0
_SHARE_OF_BITS = 0.28
# A unit that is nearly complete: the share of its tokens and of its information, and the bits.
_NEARLY_ALL, _NEARLY_ALL_BITS, _SHORT_BITS = 0.85, 0.75, 36.0
# Bits that each token costs which only one of both sides has.
_GAP_BITS = 2.0
# Seeds that must lead to about the same place: for short units, and for others.
_FEWEST_SEEDS, _SHORT_TOKENS = (2, 3), 20
_PROMISING = 0.8  # share of the information of a hit without which two texts are not aligned
# Bits of a shift in a key; a piece of text has fewer tokens, and a shift is at least -UNIT_TOKENS.
_SHIFT_BITS = 20
_BATCH = 1 << 13  # diagonals that are compared at a time


class DecontaminateMode(Enum):
    drop = "drop"
    """The document is dropped."""
    cut = "cut"
    """Shared text is cut out, with a margin; the document is dropped if little remains or it needs over 10 cuts."""
    annotate = "annotate"
    """Hits are counted and described in the document's signals, and nothing is changed."""


@dataclass(kw_only=True, slots=True)
class DecontaminateConfig:
    """Evaluation sets that must not be in the corpus, and when text counts as shared with them."""

    files: list[PathText] = field(default_factory=list)
    """Evaluation sets, each a file, a folder or an lm-eval task, named by its file or folder up to the first dot. Files
    (or URLs) are JSON lines, JSON, CSV, Parquet, or plain text with an item per line, also as .gz or .zst; folders are
    those of OpenCompass, Hugging Face and the like; a task is the YAML file of lm-eval, with local data."""
    fields: list[str] = field(default_factory=lambda: list(FIELDS))
    """Fields of an item whose strings are looked for, also those inside lists and objects. The default has the names
    that common benchmarks use for questions, choices and answers, but not those of the passages they are about."""
    index: PathText | None = None
    """File written by build_index; null: every process builds the index at its first document."""
    mode: DecontaminateMode = DecontaminateMode.drop
    ngram_words: int = 13
    """A run of this many words that is the same is always a hit; less is one where it says enough."""
    ngram_chars: int = 20
    """Same as ngram_words in characters, for texts that are at least half in a script without spaces."""
    min_words: int = 8
    """Texts of an item with fewer words are looked for only together with the other texts of the item."""
    min_chars: int = 12
    """Same as min_words in characters, for texts in a script without spaces."""
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
        names = [set_name(path) for path in self.files]
        if len(set(names)) < len(names):
            raise ConfigError(f"curation.decontaminate.files={self.files} has two files of the same name")


class Hit(NamedTuple):
    """Text that a document shares with an evaluation set."""

    start: int
    end: int
    set_name: str
    item: int
    """Number of the item in its set, from 1."""
    share: float
    """Fraction of the item's text, or of 64 words of it, that the document has (0 to 1)."""


class DecontaminateStage:
    """Drops documents as `contaminated`; `decontaminate.<set>` counts the pieces of text shared with a set.

    The signals `decontaminate.<set>.item` and `.share` name the item of the set of which the document has most.
    """

    name = "decontaminate"

    def __init__(self, config: DecontaminateConfig) -> None:
        self._config = config
        self._index: Index | None = None
        self._table: NDArray[np.bool_] = np.zeros(1, bool)

    def process(self, record: Record) -> str | None:
        hits = self.find(record.text)
        if not hits:
            return None
        for name in sorted({hit.set_name for hit in hits}):
            own = [hit for hit in hits if hit.set_name == name]
            most = max(own, key=lambda hit: hit.share)
            record.count(f"decontaminate.{name}", len(merge((hit.start, hit.end) for hit in own)))
            record.signals[f"decontaminate.{name}.item"] = most.item
            record.signals[f"decontaminate.{name}.share"] = round(most.share, 3)
        if self._config.mode is DecontaminateMode.annotate:
            return None
        if self._config.mode is DecontaminateMode.cut and (rest := self._cut(record.text, hits)):
            record.text = rest
            return None
        return "contaminated"

    def find(self, text: str) -> list[Hit]:
        """All shared text, ordered by set and item and then from left to right."""
        if self._index is None:
            self._load()
        assert self._index is not None
        index, found = self._index, dict[tuple[int, int], list[Hit]]()
        if not len(index.seeds):
            return []
        for offset, streams in streams_of(text):
            for is_unspaced, stream in enumerate(streams):
                if stream is not None and len(stream.begins) >= 2:
                    for set_number, hit in self._search(stream, bool(is_unspaced)):
                        moved = hit._replace(start=offset + hit.start, end=offset + hit.end)
                        found.setdefault((set_number, hit.item), []).append(moved)
        return [hit for key in sorted(found) for hit in _joined(found[key])]

    def _search(self, stream: Stream, is_unspaced: bool) -> Iterator[tuple[int, Hit]]:
        """The hits of one stream, each with the number of its set."""
        assert self._index is not None
        index = self._index
        hashes = stream.grams(GRAM_LETTERS[is_unspaced])
        # Few runs are seeds, so this table rules out nearly all of them.
        maybe = self._table[hashes >> np.uint64(65 - len(self._table).bit_length())].nonzero()[0]
        if not len(maybe):
            return
        hashes = hashes[maybe]
        left = np.minimum(np.searchsorted(index.seeds, hashes), len(index.seeds) - 1)
        is_seed = index.seeds[left] == hashes
        left, maybe = left[is_seed], maybe[is_seed]
        if len(maybe) < min(_FEWEST_SEEDS):
            return
        counts = self._counts[left].astype(np.int64)
        ends = counts.cumsum()
        seeds = np.arange(ends[-1]) + np.repeat(left - ends + counts, counts)
        units = self._units[seeds].astype(np.int64)
        # The token of the document that would be the first one of the unit; it may lie before the document.
        shifts = np.repeat(maybe, counts) - self._within[seeds]
        keys = _promising((units << _SHIFT_BITS) + shifts + UNIT_TOKENS, self._lengths)
        if not len(keys):
            return
        tokens = stream.tokens()
        for unit, low, high in self._candidates(tokens, keys):
            hit = self._align(stream, tokens, unit, low, high)
            if hit is not None:
                yield int(index.units[unit, 0]), hit

    def _candidates(
        self, tokens: NDArray[np.uint32], keys: NDArray[np.int64]
    ) -> Iterator[tuple[int, int, int]]:
        """Units that may be in the document, each with the range of its shifts, out of the keys of both.

        What the document has of a unit on neighboring shifts is added up, and must carry most of the information of a
        hit: more than it is found only where both are aligned.
        """
        assert self._index is not None
        keys = keys[np.append(True, keys[1:] != keys[:-1])]
        units, shifts = keys >> _SHIFT_BITS, (keys & ((1 << _SHIFT_BITS) - 1)) - UNIT_TOKENS
        parts = [slice(at, at + _BATCH) for at in range(0, len(units), _BATCH)]
        gains = np.concatenate([_gains(self._index, tokens, units[part], shifts[part]) for part in parts])
        lengths = self._lengths[units]
        first = _firsts(keys, lengths)
        last = np.append(first[1:], len(units)) - 1
        enough = np.add.reduceat(gains, first) >= _PROMISING * self._needed[units[first]]
        for one, other in zip(first[enough].tolist(), last[enough].tolist(), strict=True):
            # In text that repeats itself, neighbors may go on for long; the best of them is enough.
            best = int(shifts[one + int(gains[one : other + 1].argmax())])
            unit, length = int(units[one]), int(lengths[one])
            yield unit, max(int(shifts[one]), best - length), min(int(shifts[other]), best + length)

    def _align(
        self, stream: Stream, tokens: NDArray[np.uint32], unit: int, low: int, high: int
    ) -> Hit | None:
        """The best alignment of a unit with the tokens of the document near the shifts `low` to `high`."""
        assert self._index is not None
        index = self._index
        first, stop = int(index.starts[unit]), int(index.starts[unit + 1])
        n_tokens = stop - first
        begin, end = max(0, low - 4), min(len(tokens), high + n_tokens + 4)
        bits = index.bits[first:stop] / 10
        matcher = SequenceMatcher(None, index.tokens[first:stop].tolist(), tokens[begin:end].tolist(), False)
        blocks = [(a, a + size, b, b + size) for a, b, size in matcher.get_matching_blocks()[:-1]]
        if not blocks:
            return None
        for (_, a, _, b), (a_next, _, b_next, _) in list(pairwise(blocks)):
            # Where signs were deleted, words became one: the same letters, other words.
            if a < a_next and b < b_next:
                there = stream.joined(begin + b, begin + b_next)
                if there == joined_hash(index, first + a, first + a_next):
                    blocks.append((a, a_next, b, b_next))
        best = _best_run(sorted(blocks), bits)
        set_number, item, is_unspaced = index.units[unit].tolist()
        run = (self._config.ngram_words, self._config.ngram_chars)[is_unspaced]
        is_near = best.tokens >= _NEARLY_ALL * n_tokens and best.bits >= max(
            _SHORT_BITS, _NEARLY_ALL_BITS * bits.sum()
        )
        is_enough = best.tokens >= _ENOUGH_TOKENS[is_unspaced] and best.score >= min(
            _SURE_BITS, max(self._enough, _SHARE_OF_BITS * bits.sum())
        )
        if not (best.longest >= run or best.tokens == n_tokens or is_near or is_enough):
            return None
        start, last = int(stream.begins[begin + best.begin]), int(stream.ends[begin + best.end - 1])
        return Hit(start, last, index.names[set_number], item, best.tokens / n_tokens)

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
        self._index = index = (
            Index.read(config.index, _parameters(config)) if config.index else collect(config)
        )
        bits = min(26, max(10, (16 * len(index.seeds)).bit_length()))  # 64 MiB at most
        self._table = np.zeros(1 << bits, bool)
        self._table[index.seeds >> np.uint64(64 - bits)] = True
        # Of each seed its unit and its place there; of the first of equal seeds, their number.
        units = np.searchsorted(index.starts, index.places, "right") - 1
        self._units = units.astype(np.uint32)
        self._within = (index.places - index.starts[units]).astype(np.int16)
        counts = np.searchsorted(index.seeds, index.seeds, "right") - np.arange(len(index.seeds))
        self._counts = np.minimum(counts, 255).astype(np.uint8)
        self._lengths = np.diff(index.starts).astype(np.int64)
        sums = np.concatenate(([0], index.bits.cumsum(dtype=np.int64))) / 10
        of_units = np.diff(sums[index.starts])
        # Among more units, an accident is likelier.
        self._enough = _ENOUGH_BITS + 2 * np.log2(max(1, len(of_units) / _FEW_UNITS))
        least = np.minimum(_SURE_BITS, np.maximum(self._enough, _SHARE_OF_BITS * of_units))
        self._needed = np.minimum(least, _NEARLY_ALL_BITS * of_units)


class _Run(NamedTuple):
    """A part of the document that is aligned with a part of a unit."""

    begin: int
    end: int
    """Its first token in the window of the document, and the token after its last."""
    tokens: int
    """Tokens of the unit that it has."""
    bits: float
    """Their information."""
    score: float
    """The information less the costs of what only one side has."""
    longest: int
    """The longest run of tokens without a difference."""


def _best_run(blocks: list[tuple[int, int, int, int]], bits: NDArray[np.float64]) -> _Run:
    """The consecutive blocks with the highest score. A block is a range of the unit and one of the window."""
    sums = [0.0, *bits.cumsum().tolist()]
    best = now = _Run(0, 0, 0, 0.0, 0.0, 0)
    a_end = b_end = straight = 0
    for a, a_stop, b, b_stop in blocks:
        gain, straight = sums[a_stop] - sums[a], straight if (a, b) == (a_end, b_end) else 0
        straight += a_stop - a
        cost = _GAP_BITS * max(a - a_end, b - b_end)
        if now.score <= cost:
            now, cost = _Run(b, b, 0, 0.0, 0.0, 0), 0.0
        now = _Run(
            now.begin,
            b_stop,
            now.tokens + a_stop - a,
            now.bits + gain,
            now.score + gain - cost,
            max(now.longest, straight),
        )
        best = max(best, now, key=lambda run: run.score)
        a_end, b_end = a_stop, b_stop
    return best


def _firsts(keys: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.intp]:
    """Where another unit, or another place of the same unit, begins in the ascending keys of units and shifts."""
    return np.flatnonzero(np.append(True, keys[1:] - keys[:-1] > lengths[1:] // 2))


def _promising(keys: NDArray[np.int64], lengths_of_units: NDArray[np.int64]) -> NDArray[np.int64]:
    """The keys, in ascending order, to whose neighborhood enough seeds lead."""
    keys = np.sort(keys)
    lengths = lengths_of_units[keys >> _SHIFT_BITS]
    first = _firsts(keys, lengths)
    counts = np.append(first[1:], len(keys)) - first
    fewest = np.where(lengths[first] < _SHORT_TOKENS, *_FEWEST_SEEDS)
    return keys[np.repeat(counts >= fewest, counts)]


def _gains(
    index: Index, tokens: NDArray[np.uint32], units: NDArray[np.int64], shifts: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Information of the tokens that units share with the document where they are put at these shifts."""
    starts = index.starts[units].astype(np.int64)
    lengths = index.starts[units + 1] - starts
    edges = np.concatenate(([0], lengths.cumsum()))
    within = np.arange(edges[-1]) - np.repeat(edges[:-1], lengths)
    of_unit = within + np.repeat(starts, lengths)
    of_text = within + np.repeat(shifts, lengths)
    # Outside of the document there is a token that is no other.
    padded = np.concatenate((tokens.astype(np.int64), [-1]))
    of_text[(of_text < 0) | (of_text >= len(tokens))] = len(tokens)
    is_same = index.tokens[of_unit] == padded[of_text]
    return np.add.reduceat(is_same * index.bits[of_unit], edges[:-1], dtype=np.int64) / 10


def build_index(config: DecontaminateConfig, path: str | os.PathLike[str]) -> Index:
    """Read the evaluation files and write their index into one file. Raises ConfigError."""
    index = collect(config)
    index.write(path, _parameters(config))
    return index


def collect(config: DecontaminateConfig) -> Index:
    """Build the index. Raises ConfigError where a file cannot be read or has nothing to look for."""
    builder = IndexBuilder((config.min_words, config.min_chars))
    for entry in config.files:
        builder.begin(set_name(entry))
        without = []
        for path, fields in evaluation_files(entry, config.fields):
            n_items = 0
            for texts in read_items(path, fields):
                builder.add(texts)
                n_items += 1
            if not n_items:
                without.append(f"{path} has none of the fields {', '.join(fields)}")
        if without:
            raise ConfigError(
                f"curation.decontaminate.files: {'; '.join(without)}; name others in curation.decontaminate.fields"
            )
    return builder.finish()


def _parameters(config: DecontaminateConfig) -> str:
    """The options that an index depends on, besides the content of the files."""
    names = [set_name(path) for path in config.files]
    lengths = [config.min_words, config.min_chars]
    return json.dumps({"format": 2, "sets": names, "fields": list(config.fields), "lengths": lengths})


def _joined(hits: list[Hit]) -> list[Hit]:
    """Hits of one item from left to right, where those that overlap are one: units and pieces of a text do."""
    joined: list[Hit] = []
    for hit in sorted(hits):
        if joined and hit.start <= joined[-1].end:
            last = joined.pop()
            hit = last._replace(end=max(last.end, hit.end), share=max(last.share, hit.share))
        joined.append(hit)
    return joined


def merge(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge spans that overlap or touch, and sort them from left to right."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged
