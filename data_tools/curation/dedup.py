"""Duplicates: documents that are equal, documents that are nearly equal, and lines that many documents share.

Near duplicates are found by MinHash (Broder, 1997) in bands (locality-sensitive hashing): two documents whose shingles
have Jaccard similarity s share a band with probability 1 - (1 - s^r)^b. With b = 14 bands of r = 8 hashes, as FineWeb
(Penedo et al., 2024), that is 0.92 at s = 0.8 and one half at s = 0.69.

Every task of the first phase writes the `Signatures` of its documents. Then each band, and the hash of the whole text,
is compared separately, in ranges of the hash, which bounds the memory. The pairs that are found are joined into
clusters, and one document of each cluster is kept. A document is identified by (task << 32 | its number in the task).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import xxhash

from data_tools.curation.web_prose import is_web_prose
from data_tools.record import Record
from pretrain.errors import ConfigError
from pretrain.files import written_atomically

EXACT = 0
"""Number of the table of whole texts. The tables of the bands follow it."""
_TOKEN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|[^\W_\u3400-\u9fff\uf900-\ufaff]+")
_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio
_RANGE_ROWS = 20_000_000
"""Number of rows of a table that one task sorts at a time, which takes about 1 GB."""


@dataclass(kw_only=True, slots=True)
class DedupConfig:
    """Which documents are duplicates, and which one of them is kept."""

    exact: bool = True
    """Find texts that differ only in white space."""
    near: bool = True
    """Find texts that share most of their shingles (short runs of words)."""
    bands: int = 14
    """Number of bands; more bands find more pairs, which are less similar."""
    band_hashes: int = 8
    """Hashes per band; more hashes find fewer pairs, which are more similar."""
    shingle_words: int = 5
    """Words per shingle."""
    shingle_chars: int = 8
    """Characters per shingle of a text that is mostly Chinese; five words have about eight characters."""
    priority: list[str] = field(default_factory=list)
    """Sources in order of preference: of duplicates, the document of the earliest source in this list is kept."""
    repeated_lines: bool = True
    """Remove lines that occur in more than `max_line_documents` web pages from all of these but the first. They are
    neither looked for in nor removed from code, laws, dialogues, and documents that are no web pages."""
    web_sources: list[str] = field(default_factory=list)
    """Sources of web pages, by name or pattern such as `crawl_*`. A document with an address is a web page too."""
    max_line_documents: int = 10
    """Largest number of web pages in which a line may occur."""
    min_line_chars: int = 40
    """Smallest length in characters of a line that counts as repeated; a Chinese character counts as three."""

    def __post_init__(self) -> None:
        for name in ("bands", "band_hashes", "shingle_words", "shingle_chars", "max_line_documents"):
            if getattr(self, name) < 1:
                raise ConfigError(f"curation.dedup.{name}={getattr(self, name)} must be 1 or more")


# ---- of one text -----------------------------------------------------------------------------------------------------


def exact_hash(text: str) -> int:
    """xxh3-64 of a text, with each run of white space replaced by one blank."""
    return xxhash.xxh3_64_intdigest(" ".join(text.split()).encode())


@lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return xxhash.xxh3_64_intdigest(word.encode())


def shingles(text: str, config: DedupConfig) -> np.ndarray:
    """Distinct hashes (uint64) of the shingles of a text, ignoring case; empty where it has too few words."""
    words = _TOKEN.findall(text.lower())
    n_han = sum(len(word) == 1 and _HAN.match(word) is not None for word in words)
    width = config.shingle_chars if 2 * n_han > len(words) else config.shingle_words
    if len(words) < width:
        return np.zeros(0, dtype=np.uint64)
    hashes = np.fromiter(map(_word_hash, words), dtype=np.uint64, count=len(words))
    rolled = hashes[: len(hashes) - width + 1].copy()
    for place in range(1, width):  # mix before each addition, so that the order of words counts
        rolled *= _MIX
        rolled ^= rolled >> np.uint64(29)
        rolled += hashes[place : len(hashes) - width + 1 + place]
    return np.unique(rolled)


@lru_cache(maxsize=4)
def _permutations(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Odd multipliers and addends (uint64 [n]), the same on every machine."""
    seeds = (xxhash.xxh3_64_intdigest(f"minhash {kind} {i}".encode()) for kind in "ab" for i in range(n))
    drawn = np.fromiter(seeds, dtype=np.uint64, count=2 * n)
    return drawn[:n] | np.uint64(1), drawn[n:]


def band_hashes(text: str, config: DedupConfig) -> np.ndarray | None:
    """Hashes of the bands: uint64 [bands]. Documents with one hash in common are near duplicates.

    None where a text is too short. The shingles are hashed by multiply-shift (Dietzfelbinger et al., 1997), which
    needs no modulus and so is fast.
    """
    found = shingles(text, config)
    if not len(found):
        return None
    multipliers, addends = _permutations(config.bands * config.band_hashes)
    smallest = np.full(len(multipliers), np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(found), 2048):  # bounds the memory of a long document
        hashed = found[start : start + 2048, None] * multipliers + addends
        np.minimum(smallest, hashed.min(axis=0), out=smallest)
    rows = np.ascontiguousarray((smallest >> np.uint64(32)).astype(np.uint32).reshape(config.bands, -1))
    return np.array([xxhash.xxh3_64_intdigest(row.tobytes()) for row in rows], dtype=np.uint64)


def line_hashes(record: Record, config: DedupConfig) -> list[tuple[int, str]]:
    """(hash, line) of the lines of web prose that are long enough to be compared; white space and case do not count."""
    found: list[tuple[int, str]] = []
    if not config.repeated_lines or not is_web_prose(record, config.web_sources):
        return found
    for line in record.text.split("\n"):
        plain = " ".join(line.split()).lower()
        if len(plain) + 2 * len(_HAN.findall(plain)) >= config.min_line_chars:
            found.append((xxhash.xxh3_64_intdigest(plain.encode()), line))
    return found


# ---- of one task -----------------------------------------------------------------------------------------------------


class Signatures:
    """Hashes of a task's documents: tables of (hash, document), each sorted by hash."""

    def __init__(self, config: DedupConfig) -> None:
        self._config = config
        self._tables: list[list[tuple[int, int]]] = [[] for _ in range(n_tables(config))]
        self._lines: list[tuple[int, int]] = []

    def add(self, document: int, record: Record) -> None:
        """Add the next document that the stages kept; `document` is its number in the task."""
        config, text = self._config, record.text
        if config.exact:
            self._tables[EXACT].append((exact_hash(text), document))
        if config.near and (bands := band_hashes(text, config)) is not None:
            for table, value in zip(self._tables[EXACT + 1 :], bands.tolist(), strict=True):
                table.append((value, document))
        self._lines += [(value, document) for value in {value for value, _ in line_hashes(record, config)}]

    def write(self, folder: Path, rank: int) -> None:
        """Write one .npy file per table (uint64 [documents, 2]), each atomically."""
        for number, rows in enumerate([*self._tables, self._lines]):
            table = np.array(rows, dtype=np.uint64).reshape(-1, 2)
            save_array(table_path(folder, number, rank), table[np.lexsort((table[:, 1], table[:, 0]))])


def n_tables(config: DedupConfig) -> int:
    """Number of tables in which equal hashes mean duplicates: whole texts and bands, without the table of lines."""
    return 1 + (config.bands if config.near else 0)


def table_path(folder: Path, table: int, rank: int) -> Path:
    """Path of a table of a task."""
    return folder / f"table-{table:03d}" / f"{rank:05d}.npy"


def save_array(path: Path, array: np.ndarray) -> None:
    """Write one array atomically, and so that it survives a power cut: its task may already count as done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(path, durable=True) as file:
        # numpy would write to the descriptor itself, and its error on a full disk has no errno.
        np.save(SimpleNamespace(write=file.write), array, allow_pickle=False)


def load_array(path: Path, *, mapped: bool = False) -> np.ndarray:
    """Load what `save_array` wrote; with `mapped`, only the parts that are used are read."""
    return np.load(path, allow_pickle=False, mmap_mode="r" if mapped else None)


# ---- of all tasks ----------------------------------------------------------------------------------------------------


def n_ranges(folder: Path, table: int, n_ranks: int) -> int:
    """Number of ranges of the hash in which a table is compared."""
    rows = sum(len(load_array(table_path(folder, table, rank), mapped=True)) for rank in range(n_ranks))
    return max(1, -(-rows // _RANGE_ROWS))


def read_range(folder: Path, table: int, n_ranks: int, part: int, parts: int) -> np.ndarray:
    """(hash, document) of all tasks in one range of the hash, sorted by both: uint64 [rows, 2]."""
    low, high = (part << 64) // parts, ((part + 1) << 64) // parts
    found = []
    for rank in range(n_ranks):
        rows = load_array(table_path(folder, table, rank), mapped=True)
        start = int(np.searchsorted(rows[:, 0], np.uint64(low)))
        stop = len(rows) if high >> 64 else int(np.searchsorted(rows[:, 0], np.uint64(high)))
        chosen = np.array(rows[start:stop])
        chosen[:, 1] |= np.uint64(rank << 32)
        found.append(chosen)
    joined = np.concatenate(found) if found else np.zeros((0, 2), dtype=np.uint64)
    return joined[np.lexsort((joined[:, 1], joined[:, 0]))]


def pairs_in(rows: np.ndarray) -> np.ndarray:
    """Pairs of the first document of each run of equal hashes with every other one: uint64 [pairs, 2]."""
    if len(rows) < 2:
        return np.zeros((0, 2), dtype=np.uint64)
    begins = np.concatenate(([True], rows[1:, 0] != rows[:-1, 0]))
    first = rows[np.maximum.accumulate(np.where(begins, np.arange(len(rows)), 0)), 1]
    pairs = np.column_stack((first, rows[:, 1]))[~begins]
    return pairs[pairs[:, 0] != pairs[:, 1]]


def components(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The documents that occur in pairs, sorted, and for each the index of the first document of its cluster.

    Each label is lowered to the smallest label among its neighbors, then replaced by the label of its label, until
    nothing changes.
    """
    documents, flat = np.unique(pairs, return_inverse=True)
    left, right = flat.reshape(-1, 2).T
    labels = np.arange(len(documents))
    while True:
        before = labels.copy()
        smaller = np.minimum(labels[left], labels[right])
        np.minimum.at(labels, labels[left], smaller)
        np.minimum.at(labels, labels[right], smaller)
        while not np.array_equal(followed := labels[labels], labels):
            labels = followed
        if np.array_equal(labels, before):
            return documents, labels


def choose_kept(labels: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Whether each document is kept: bool [documents]. One per cluster is: the first of those with the lowest rank.

    `ranks` is the priority of each document's source, the smallest first: int [documents].
    """
    order = np.lexsort((np.arange(len(labels)), ranks, labels))
    first = np.concatenate(([True], labels[order][1:] != labels[order][:-1])) if len(order) else []
    kept = np.zeros(len(labels), dtype=bool)
    kept[order] = first
    return kept


def repeated_lines_in(rows: np.ndarray, max_documents: int) -> np.ndarray:
    """Lines in more than `max_documents` documents, each with the first one, which keeps it: uint64 [lines, 2]."""
    if not len(rows):
        return np.zeros((0, 2), dtype=np.uint64)
    begins = np.flatnonzero(np.concatenate(([True], rows[1:, 0] != rows[:-1, 0])))
    sizes = np.diff(np.append(begins, len(rows)))
    return rows[begins[sizes > max_documents]]
