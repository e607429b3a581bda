"""The index of evaluation sets: their texts as hashes of tokens, and the short runs by which a document finds them.

A text is cut into units of at most 64 tokens. Runs of a few letters, the seeds, lead from a document to the units that
it may hold; only seeds that carry enough information are kept, so that common phrases lead nowhere. The information of
a word in bits follows from its rank among the common words, by Zipf's law, and from its length.
"""

from __future__ import annotations

import functools
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.stages.decontamination.canonical import Hashes, Stream, powers, streams_of
from pretrain.errors import ConfigError
from pretrain.files import open_regular, written_atomically

GRAM_LETTERS = (12, 5)
"""Letters of a seed: of words, and of scripts without spaces."""
UNIT_TOKENS = 64
_UNIT_STEP = 44  # units of a long text overlap by 20 tokens
_SEED_BITS = (16.0, 18.0)
_FEWEST_SEEDS = 8  # a unit keeps as many, whatever information they carry
_MOST_UNITS = 4  # that one seed leads to
_MAX_TOKENS = 1 << 26  # an index of 1 GiB

# The most frequent first, counted in encyclopedia articles, news, dialogues, manuals and programs.
_COMMON_WORDS = (
    "the a of to and in is i for that it this s x be as if are from b with on or by not you an have was t return but "
    "can at which p will c they n all one said so type v const its he we has would true new do there what name when "
    "like d other no y also f class about func their import function more m only some vs data value use his my r used "
    "e any had up been file time just set self were case number may than into out such false int get object then two "
    "first them how your who should most state people these see year point def me because g well system string re "
    "after reg must think make does could now good don code default group python same none go method know over many "
    "param args each pct arg module line types where really l op test three using list work size right else called "
    "while example last even those k between world w way being need given before let base both order values read "
    "range much too color returns h did free company add array nil functions real block note power very known call "
    "she source here index error part long since j end common family want len struct export through key o based ir "
    "property current result memory our support under float am made com length inc her different without share "
    "include why him off oh pi within means social still back js own per id max bit attribute non files null life "
    "form buffer take however always say another section pos following argument th during format next against start "
    "mode position core write years term information writes find output mod version going available something log us "
    "either high ve path things down control day though single zero level often man never help process run little err "
    "around program large possible create american package change input target whether uint including great bytes few "
    "corp body kind user integer private bool points got march government cannot might art every map try count "
    "general co written best usually internal actually music better main context old sure space far open probably "
    "once lot article thing small instance above love interface major instead reference left offset god added text "
    "second half ll mul copy sys super typ check includes done least print address states until https field var human "
    "place message specific ask min pretty style "
)
_COMMON_CHARACTERS = (
    "的一是有人不在用以和中了个可这本行件为国文者我会要上作定法到能使对下大时来第如理其生于当子书之地或发应内出他关所"
    "自工条过民也十动多得事系你方经部成业看们而设通进程分务管年同数实些面提家统包很后全制表就政机主它好代开并新参规建"
    "被都合小情学核重现保果说安任由处将员置前接加公式更版从与意产问常目体心配二软存相最等三但性区因化间位日明物然列需"
    "无还器里种信手名解修单样正门据令示入道字节标命外改读没那级及高调考点语知特何构序此查持展期长该给量品活度备力报见"
    "想基取组起天权指具向感已运利结论"
)
_MOST_BITS, _MOST_BITS_OF_CHARACTER = 12.0, 5.5


class Index(NamedTuple):
    """All units of the evaluation sets, and the seeds that lead to them."""

    seeds: Hashes
    """Hashes of the seeds, sorted; a seed of several places is listed as often."""
    places: NDArray[np.uint32]
    """The token at which each seed begins, as an index into `tokens`."""
    tokens: NDArray[np.uint32]
    """A hash of each token of each unit."""
    letters: NDArray[np.uint8]
    """Number of letters of each token, 255 for more."""
    bits: NDArray[np.uint8]
    """Information of each token in tenths of a bit."""
    starts: NDArray[np.uint32]
    """The first token of each unit, and the end of the last one."""
    units: NDArray[np.uint32]
    """Of each unit the number of its set, the number of its item in the set from 1, and whether it has no spaces."""
    names: list[str]
    """Names of the sets."""
    items: list[int]
    """Number of items of each set."""
    too_short: list[int]
    """Number of items of each set that are too short to be looked for."""

    def write(self, path: str | os.PathLike[str], parameters: str) -> None:
        """Write one .npz file without pickle; the same content gives the same bytes."""
        head = [parameters, self.names, self.items, self.too_short]
        with written_atomically(Path(path), durable=True) as file:
            arrays = {name: getattr(self, name) for name in _ARRAYS}
            np.savez(file, allow_pickle=False, head=np.array(json.dumps(head)), **arrays)

    @classmethod
    def read(cls, path: str | os.PathLike[str], parameters: str) -> Index:
        """Read an index. Raises ConfigError where the file is not one, or was built with other parameters."""
        try:
            with open_regular(path) as file:
                _check_stored(file)
                with np.load(file, allow_pickle=False) as arrays:
                    built_with, *head = json.loads(str(arrays["head"]))
                    if built_with != parameters:
                        raise ConfigError(
                            f"curation.decontaminate.index={path} was built with {built_with}, but now it is "
                            f"{parameters}; build it again"
                        )
                    index = cls(*(arrays[name] for name in _ARRAYS), *head)
                    _check(index)
        except (
            OSError,
            ValueError,
            TypeError,
            KeyError,
            MemoryError,
            RecursionError,
            zipfile.BadZipFile,
        ) as error:
            raise ConfigError(f"curation.decontaminate.index={path} cannot be read: {error}") from error
        return index


_ARRAYS = ("seeds", "places", "tokens", "letters", "bits", "starts", "units")
_KINDS = (np.uint64, np.uint32, np.uint32, np.uint8, np.uint8, np.uint32, np.uint32)


def _check_stored(file: IO[bytes]) -> None:
    """Refuse compressed arrays, which `Index.write` never writes. Raises ValueError and BadZipFile."""
    for info in zipfile.ZipFile(file).infolist():
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{info.filename} in it is compressed, which build_index never does")
    file.seek(0)


def _check(index: Index) -> None:
    """Refuse arrays that do not fit each other, at which a search would fail. Raises ValueError."""
    n_tokens, n_units = len(index.tokens), len(index.starts) - 1
    fits = all(array.dtype == kind for array, kind in zip(index[: len(_KINDS)], _KINDS, strict=True))
    fits = fits and index.units.shape == (n_units, 3) and len(index.places) == len(index.seeds)
    fits = fits and n_tokens == len(index.letters) == len(index.bits) == index.starts[-1]
    fits = fits and int(index.places.max(initial=0)) < max(1, n_tokens)
    fits = fits and bool((np.diff(index.starts.astype(np.int64)) > 0).all())
    if not fits or int(index.units[:, 0].max(initial=0)) >= max(1, len(index.names)):
        raise ValueError("its arrays do not fit each other")


# ---- building --------------------------------------------------------------------------------------------------------


class IndexBuilder:
    """Collects units, set by set and item by item."""

    def __init__(self, min_tokens: tuple[int, int]) -> None:
        self._min_tokens = min_tokens
        self._seeds, self._places = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        self._tokens, self._letters = [np.empty(0, np.uint32)], [np.empty(0, np.uint8)]
        self._bits = [np.empty(0, np.uint8)]
        self._starts, self._units = [0], list[tuple[int, int, int]]()
        self._known: set[bytes] = set()
        self._names, self._items, self._too_short = list[str](), list[int](), list[int]()

    def begin(self, name: str) -> None:
        """Begin a set."""
        self._names.append(name)
        self._items.append(0)
        self._too_short.append(0)
        self._known.clear()

    def add(self, texts: list[str]) -> None:
        """Add an item. Texts that are too short alone are looked for as one text. Raises ConfigError."""
        self._items[-1] += 1
        found = [self._add_text(text) for text in texts]
        if not any(found) and not (len(texts) > 1 and self._add_text("\n".join(texts))):
            self._too_short[-1] += 1

    def finish(self) -> Index:
        """The index of everything added so far."""
        seeds = np.concatenate(self._seeds)
        order = np.argsort(seeds, kind="stable")
        seeds = seeds[order]
        # The place of each seed among equal ones.
        rank = np.arange(len(seeds)) - np.searchsorted(seeds, seeds, "left")
        order, seeds = order[rank < _MOST_UNITS], seeds[rank < _MOST_UNITS]
        return Index(
            seeds,
            np.concatenate(self._places)[order].astype(np.uint32),
            np.concatenate(self._tokens),
            np.concatenate(self._letters),
            np.concatenate(self._bits),
            np.array(self._starts, np.uint32),
            np.array(self._units, np.uint32).reshape(-1, 3),
            self._names,
            self._items,
            self._too_short,
        )

    def _add_text(self, text: str) -> bool:
        """Add the units of a text. Returns whether it is long enough."""
        is_found = False
        for _, streams in streams_of(text):
            unspaced = streams.unspaced
            is_unspaced = unspaced is not None and len(unspaced.begins) >= len(streams.spaced.begins)
            stream = unspaced if is_unspaced else streams.spaced
            assert stream is not None
            if len(stream.begins) >= self._min_tokens[is_unspaced]:
                is_found = True
                self._add_stream(stream, text, is_unspaced)
        return is_found

    def _add_stream(self, stream: Stream, text: str, is_unspaced: bool) -> None:
        tokens = stream.tokens()
        if tokens.tobytes() in self._known:
            return
        self._known.add(tokens.tobytes())
        letters = np.diff(stream.bounds)
        bits = _information(stream, is_unspaced)
        grams = stream.grams(GRAM_LETTERS[is_unspaced])
        sums = np.concatenate(([0], bits.cumsum()))
        ends = stream.bounds[: len(grams)] + GRAM_LETTERS[is_unspaced]
        of_grams = np.interp(ends, stream.bounds, sums) - sums[: len(grams)]
        for first, stop in _cut(len(tokens)):
            # A seed belongs to the unit in which it begins and ends.
            count = int(np.searchsorted(ends[first:], stream.bounds[stop], "right"))
            own = of_grams[first : first + count]
            strong = np.flatnonzero(own >= _SEED_BITS[is_unspaced])
            if len(strong) < _FEWEST_SEEDS:
                strong = np.argsort(-own, kind="stable")[:_FEWEST_SEEDS]
            self._seeds.append(grams[first : first + count][strong])
            self._places.append(strong + self._starts[-1])
            self._tokens.append(tokens[first:stop])
            self._letters.append(np.minimum(letters[first:stop], 255).astype(np.uint8))
            self._bits.append(np.round(10 * bits[first:stop]).astype(np.uint8))
            self._starts.append(self._starts[-1] + stop - first)
            self._units.append((len(self._names) - 1, self._items[-1], int(is_unspaced)))
        if self._starts[-1] > _MAX_TOKENS:
            raise ConfigError(
                f"curation.decontaminate.files have more than {_MAX_TOKENS:,} words up to the set {self._names[-1]}; "
                "leave some out, or name fewer curation.decontaminate.fields"
            )


def _cut(n_tokens: int) -> Iterator[tuple[int, int]]:
    """Bounds of the units of a text; the last one is as long as the others."""
    for first in range(0, max(1, n_tokens - (UNIT_TOKENS - _UNIT_STEP)), _UNIT_STEP):
        first = max(0, min(first, n_tokens - UNIT_TOKENS))
        yield first, min(first + UNIT_TOKENS, n_tokens)


def _information(stream: Stream, is_unspaced: bool) -> NDArray[np.float64]:
    """Bits of each token of a stream."""
    tokens = stream.tokens()
    hashes, ranked = _common(is_unspaced)
    at = np.searchsorted(hashes, tokens).clip(max=len(hashes) - 1)
    if is_unspaced:  # the next character is easier to guess than the next word
        return np.where(
            hashes[at] == tokens, np.minimum(ranked[at] / 2, _MOST_BITS_OF_CHARACTER), _MOST_BITS_OF_CHARACTER
        )
    bits = np.minimum(_MOST_BITS, 2 + 1.8 * np.diff(stream.bounds))
    return np.where(hashes[at] == tokens, np.minimum(ranked[at], bits), bits)


@functools.cache
def _common(is_unspaced: bool) -> tuple[NDArray[np.uint32], NDArray[np.float64]]:
    """Hashes of the common words or characters, sorted, and the information of each."""
    ((_, streams),) = streams_of(_COMMON_CHARACTERS if is_unspaced else _COMMON_WORDS)
    stream = streams.unspaced if is_unspaced else streams.spaced
    assert stream is not None
    tokens = stream.tokens()
    order = np.argsort(tokens)
    return tokens[order], (3.5 if is_unspaced else 1.0) + np.log2(order + 1)


def joined_hash(index: Index, first: int, stop: int) -> int:
    """A hash of the letters of the tokens `first` to `stop`, as if they were one token."""
    places = np.concatenate(([0], index.letters[first:stop].astype(np.int64).cumsum()))
    scales = powers(int(places[-1]))[0][places[:-1]]
    return int((index.tokens[first:stop].astype(np.uint64) * scales).sum()) & 0xFFFFFFFF
