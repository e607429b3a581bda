"""Looks for the text of evaluation items in the training corpus itself, which is read once, in bounded memory.

Runs of 13 words, or of 20 characters of scripts without spaces, are compared as 64-bit hashes, as in GPT-3's report. A
text that is shorter is looked for as a whole, if it has 8 words or 12 characters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.manifest import MANIFEST_NAME
from pretrain.corpus.shards import Corpus, documents_of
from pretrain.corpus.tokenizer import Tokenizer, tokenizer_in
from pretrain.errors import ConfigError

Hashes = NDArray[np.uint64]
Grams = Callable[[str, int | None], dict[int, Hashes]]
"""The hashes of the runs of a text, by the kind and the length of a run in one number. With None, those of the lengths
that fit the text; with a key, only those."""


class Wanted:
    """The runs of the texts of some items, and which of them were found."""

    def __init__(self, items: Sequence[Sequence[str]], runs: Callable[[str], dict[int, Hashes]]) -> None:
        rows = [(key, hashes, item) for item, texts in enumerate(items) for text in texts
                for key, hashes in runs(text).items() if len(hashes)]  # fmt: skip
        self.keys = sorted({key for key, _, _ in rows})
        """Kinds and lengths of the runs."""
        self._n_items = len(items)
        self._hashes: dict[int, Hashes] = {}
        self._items: dict[int, NDArray[np.int64]] = {}
        self._found: dict[int, NDArray[np.bool_]] = {}
        for key in self.keys:
            mine = [(hashes, item) for kind, hashes, item in rows if kind == key]
            hashes = np.concatenate([hashes for hashes, _ in mine])
            owners = np.concatenate([np.full(len(hashes), item) for hashes, item in mine])
            order = np.argsort(hashes, kind="stable")
            self._hashes[key], self._items[key] = hashes[order], owners[order]
            self._found[key] = np.zeros(len(order), bool)

    def look_in(self, key: int, hashes: Hashes) -> None:
        """Note which runs are among those of a document."""
        known = self._hashes[key]
        first = np.searchsorted(known, hashes, "left").clip(max=len(known) - 1)
        self._found[key][np.unique(first[known[first] == hashes])] = True

    def in_corpus(self) -> list[bool | None]:
        """Of each item whether one of its runs was found; None where its texts are too short."""
        looked_for, found = np.zeros(self._n_items, bool), np.zeros(self._n_items, bool)
        for key in self.keys:
            # Of equal hashes only the first is marked.
            first = np.searchsorted(self._hashes[key], self._hashes[key], "left")
            looked_for[self._items[key]] = True
            found[self._items[key][self._found[key][first]]] = True
        return [bool(hit) if known else None for hit, known in zip(found, looked_for, strict=True)]


def open_corpus(folder: Path) -> tuple[Corpus, Tokenizer]:
    """A prepared corpus and its own tokenizer, which need not be that of a model. Raises ConfigError."""
    if not (folder / MANIFEST_NAME).is_file():
        raise ConfigError(f"corpus={folder} holds no {MANIFEST_NAME}; give the folder of a prepared corpus")
    corpus = Corpus(folder / MANIFEST_NAME)
    place = folder if tokenizer_in(folder).exists() else folder.parent
    return corpus, Tokenizer(tokenizer_in(place), sha256=corpus.manifest.tokenizer_sha256)


def texts_of(corpus: Corpus, tokenizer: Tokenizer) -> Iterator[str]:
    """The text of each document. Raises CorruptShardError."""
    for document in documents_of(corpus):
        yield tokenizer.decode(document.tokens.tolist())
