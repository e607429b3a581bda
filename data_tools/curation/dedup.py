"""Duplicates: documents that are equal, documents that are nearly equal, and lines that many documents share.

Two documents are near duplicates where the Jaccard similarity of their shingles (short runs of words) reaches
`min_similarity`. Candidates are found by MinHash (Broder, 1997) in bands (locality-sensitive hashing): two documents
with similarity s share a band with probability 1 - (1 - s^r)^b. With b = 14 bands of r = 5 hashes that is 0.996 at
s = 0.8 and 0.9996 at s = 0.85. `similar.py` then computes the similarity of the candidates exactly, from their texts.

Every task of the first phase writes one row per document (`row_type`), and one table per kind of hash with the
(hash, document) of its documents. Each table is compared separately, in ranges of the hash, which bounds the memory.
A document is identified by (task << 32 | its number in the task).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import xxhash

from data_tools.curation.addresses import address_hashes
from data_tools.record import Record
from data_tools.stages.web_prose import is_web_prose
from data_tools.text import MARKS, UNSPACED, has_marks
from pretrain.errors import ConfigError
from pretrain.files import written_atomically

EXACT, URL, DOMAIN, LINES = "exact", "url", "domain", "lines"
"""Names of tables: whole texts, addresses, domains and lines. Those of the bands are `band-00` and so on."""
NO_DOCUMENT = (1 << 64) - 1
_TOKEN = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
_UNSPACED = re.compile(rf"[{UNSPACED}]")
_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio
_RANGE_ROWS = 5_000_000
"""Number of rows of a table that one task sorts at a time, which takes about 300 MB."""


@dataclass(kw_only=True, slots=True)
class DedupConfig:
    """Which documents are duplicates, and which one of them is kept."""

    exact: bool = True
    """Find texts that differ only in white space."""
    near: bool = True
    """Find texts that share most of their shingles (short runs of words)."""
    min_similarity: float = 0.8
    """Jaccard similarity (0 to 1) of the shingles of two texts from which one of them is a near duplicate."""
    bands: int = 14
    """Number of bands; more bands find more of the near duplicates. Lower similarities need more of them."""
    band_hashes: int = 5
    """Hashes per band; fewer hashes find more of the near duplicates, and more candidates have to be verified."""
    shingle_words: int = 5
    """Words per shingle."""
    shingle_chars: int = 4
    """Characters per shingle of a text that is mostly Chinese."""
    url: bool = False
    """Keep one document per address; scheme, `www.`, tracking parameters and fragment do not count."""
    max_documents_per_domain: int | None = None
    """Largest number of documents of a registered domain (`example.co.uk`); null: any number."""
    against: list[str] = field(default_factory=list)
    """Output folders of earlier curations. Their documents count as kept, so only what they lack is added."""
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
        for name in ("bands", "shingle_words", "shingle_chars", "max_line_documents"):
            if getattr(self, name) < 1:
                raise ConfigError(f"curation.dedup.{name}={getattr(self, name)} must be 1 or more")
        if self.band_hashes < 3:  # a hash is stored in 8 bits, and bands of 16 bits would group everything
            raise ConfigError(f"curation.dedup.band_hashes={self.band_hashes} must be 3 or more")
        if not 0 < self.min_similarity <= 1:
            raise ConfigError(f"curation.dedup.min_similarity={self.min_similarity} must be above 0, up to 1")
        if self.max_documents_per_domain is not None and self.max_documents_per_domain < 1:
            raise ConfigError(
                f"curation.dedup.max_documents_per_domain={self.max_documents_per_domain} must be 1 or more, or null"
            )


# ---- of one text -----------------------------------------------------------------------------------------------------


def exact_hash(text: str) -> int:
    """xxh3-64 of a text, with each run of white space replaced by one blank."""
    return xxhash.xxh3_64_intdigest(" ".join(text.split()).encode())


@lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return xxhash.xxh3_64_intdigest(word.encode())


@lru_cache(maxsize=1)
def _marked_token() -> re.Pattern[str]:
    """The pattern for text with combining marks, which belong to the character before them. It compiles in 10 ms."""
    return re.compile(rf"[{UNSPACED}][{MARKS}]*|(?:[^\W_{UNSPACED}][{MARKS}\u200c\u200d]*)+")


def shingles(text: str, config: DedupConfig) -> np.ndarray:
    """Distinct hashes (uint64) of the shingles of a text, sorted, ignoring case; empty where it has too few words."""
    words = (_marked_token() if has_marks(text) else _TOKEN).findall(text.lower())
    n_unspaced = 0 if text.isascii() else sum(_UNSPACED.match(word) is not None for word in words)
    width = config.shingle_chars if 2 * n_unspaced > len(words) else config.shingle_words
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


def sketch(found: np.ndarray, config: DedupConfig) -> np.ndarray:
    """The smallest hash of the shingles under each permutation, in 8 bits: uint8 [bands, band_hashes].

    Two hashes agree with a probability of the Jaccard similarity, and by chance in one of 256 other cases. The
    shingles are hashed by multiply-shift (Dietzfelbinger et al., 1997), which needs no modulus and so is fast.
    """
    multipliers, addends = _permutations(config.bands * config.band_hashes)
    smallest = np.full(len(multipliers), np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(found), 2048):  # bounds the memory of a long document
        hashed = found[start : start + 2048, None] * multipliers + addends
        np.minimum(smallest, hashed.min(axis=0), out=smallest)
    # The highest bits of a minimum are mostly 0, and the lowest ones depend on the lowest of the shingle only.
    return (smallest >> np.uint64(24)).astype(np.uint8).reshape(config.bands, config.band_hashes)


def band_keys(sketches: np.ndarray) -> np.ndarray:
    """Hashes of one band of many documents: uint8 [documents, band_hashes] to uint64 [documents]."""
    keys = np.zeros(len(sketches), dtype=np.uint64)
    for column in sketches.T:
        keys += column.astype(np.uint64) + np.uint64(1)
        keys *= _MIX
        keys ^= keys >> np.uint64(29)
    return keys * _MIX


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


def row_type(config: DedupConfig) -> np.dtype:
    """What is stored of each document, 110 bytes by default."""
    bands = config.bands if config.near else 0
    return np.dtype(
        [
            ("exact", "<u8"),  # exact_hash
            ("url", "<u8"),  # of the address without what does not count, or 0
            ("domain", "<u8"),  # of the registered domain, or 0
            ("line_bytes", "<u8"),  # where the document's line begins in the file of its task
            ("preference", "<u4"),  # place of its source in `priority`; the smallest is kept
            ("shingles", "<u4"),  # number of distinct ones
            ("sketch", "u1", (bands, config.band_hashes)),
        ]
    )


class Signatures:
    """Hashes of a task's documents: a row for each, and tables of (hash, document), each sorted by hash."""

    def __init__(self, config: DedupConfig) -> None:
        self._config = config
        self._rows: list[tuple[int, ...]] = []
        self._sketches: list[np.ndarray] = []
        self._lines: list[tuple[int, int]] = []
        self._order = {name: place for place, name in enumerate(config.priority)}
        self._none = np.zeros((config.bands if config.near else 0, config.band_hashes), dtype=np.uint8)

    def add(self, record: Record, line_bytes: int) -> None:
        """Add the next document that the stages kept; `line_bytes` is where its line begins."""
        config, document = self._config, len(self._rows)
        url, domain = address_hashes(record.url) if record.url else (0, 0)
        found = shingles(record.text, config) if config.near else ()
        self._sketches.append(sketch(found, config) if len(found) else self._none)
        preference = self._order.get(record.source, len(self._order))
        self._rows.append((exact_hash(record.text), url, domain, line_bytes, preference, len(found)))
        self._lines += [(value, document) for value in {value for value, _ in line_hashes(record, config)}]

    def write(self, folder: Path, rank: int) -> None:
        """Write the rows and tables, each atomically."""
        rows = np.zeros(len(self._rows), dtype=row_type(self._config))
        for place, name in enumerate(rows.dtype.names[:-1]):
            rows[name] = [row[place] for row in self._rows]
        if self._rows:
            rows["sketch"] = np.stack(self._sketches)
        save_array(rows_path(folder, rank), rows)
        write_tables(folder, rank, rows, self._config)
        lines = np.array(self._lines, dtype=np.uint64).reshape(-1, 2)
        _save_table(folder, LINES, rank, lines[:, 0], lines[:, 1])


def write_tables(folder: Path, rank: int, rows: np.ndarray, config: DedupConfig) -> None:
    """Write the tables of a task's rows, without that of the lines."""
    for name in equal_tables(config):
        chosen = np.flatnonzero((rows[name] != 0) | (name == EXACT))
        _save_table(folder, name, rank, rows[name][chosen], chosen)
    chosen = np.flatnonzero(rows["shingles"])
    for band, name in enumerate(band_tables(config)):
        _save_table(folder, name, rank, band_keys(rows["sketch"][chosen, band]), chosen)


def _save_table(folder: Path, name: str, rank: int, hashes: np.ndarray, documents: np.ndarray) -> None:
    order = np.lexsort((documents, hashes))
    table = np.column_stack((hashes.astype(np.uint64), documents.astype(np.uint64)))[order]
    save_array(table_path(folder, name, rank), table)


def equal_tables(config: DedupConfig) -> list[str]:
    """Tables of which equal hashes decide alone, in the order in which they do."""
    wanted = {URL: config.url, DOMAIN: config.max_documents_per_domain is not None, EXACT: config.exact}
    return [name for name, yes in wanted.items() if yes]


def band_tables(config: DedupConfig) -> list[str]:
    """Tables of the bands, of which equal hashes make two documents candidates."""
    return [f"band-{number:02d}" for number in range(config.bands)] if config.near else []


def table_path(folder: Path, table: str, rank: int) -> Path:
    """Path of a table of a task."""
    return folder / f"table-{table}" / f"{rank:05d}.npy"


def rows_path(folder: Path, rank: int) -> Path:
    """Path of the rows of a task."""
    return folder / "rows" / f"{rank:05d}.npy"


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


def n_rows(folder: Path, table: str, n_ranks: int) -> int:
    """Number of rows of a table in all tasks."""
    return sum(len(load_array(table_path(folder, table, rank), mapped=True)) for rank in range(n_ranks))


def n_ranges(rows: int) -> int:
    """Number of ranges of the hash in which a table of `rows` rows is compared."""
    return max(1, -(-rows // _RANGE_ROWS))


def read_range(folder: Path, table: str, n_ranks: int, part: int, parts: int) -> np.ndarray:
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


def is_in(documents: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether each document is among the others, which are sorted: bool [documents]."""
    if not len(others):
        return np.zeros(len(documents), dtype=bool)
    places = np.minimum(np.searchsorted(others, documents), len(others) - 1)
    return others[places] == documents


def places_in_runs(hashes: np.ndarray) -> np.ndarray:
    """For each row of a sorted table, its place in the run of equal hashes, from 0: int [rows]."""
    begins = np.ones(len(hashes), dtype=bool)
    begins[1:] = hashes[1:] != hashes[:-1]
    places = np.arange(len(hashes))
    return places - np.maximum.accumulate(np.where(begins, places, 0))


def in_runs(rows: np.ndarray) -> np.ndarray:
    """The rows of a sorted table whose hash occurs more than once."""
    equal = rows[1:, 0] == rows[:-1, 0]
    several = np.zeros(len(rows), dtype=bool)
    several[1:] = equal
    several[:-1] |= equal
    return rows[several]


def repeated_lines_in(rows: np.ndarray, max_documents: int) -> np.ndarray:
    """Lines in more than `max_documents` documents, each with the first one, which keeps it: uint64 [lines, 2]."""
    if not len(rows):
        return np.zeros((0, 2), dtype=np.uint64)
    begins = np.flatnonzero(np.concatenate(([True], rows[1:, 0] != rows[:-1, 0])))
    sizes = np.diff(np.append(begins, len(rows)))
    return rows[begins[sizes > max_documents]]
