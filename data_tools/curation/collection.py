"""All documents that are compared: those of this curation's tasks, and those that earlier curations kept.

An earlier curation left in its output folder, beside `documents/part-NNNNN.jsonl`, the same rows that the tasks of this
one write (`dedup.row_type`):

    signatures/index.json       how the rows were made, and the parts of the output (`SignatureIndex`)
    signatures/part-NNNNN.rows  one row per document of that part, without a header

Both are checked before they are used, because others may have made them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_tools.curation.dedup import DedupConfig, load_array, row_type, rows_path
from pretrain.errors import ConfigError
from pretrain.files import read_capped
from pretrain.stored import Annotated, Count, FileName, Ge, Le, Line, MaxLen, Sha256, parse, parse_plain

SIGNATURES, DOCUMENTS, INDEX = "signatures", "documents", "index.json"
FORMAT = 1
_MAX_INDEX_BYTES = 64 << 20
_MAX_PARTS = 1 << 18
_MAX_LINE_BYTES = 256 << 20
"""Largest number of bytes of a document's line. `read.max_line_bytes` allows 32 MiB, and JSON may double it."""
_MAX_LINE_VALUES = 1 << 16
_NO_RANK = np.uint64((1 << 64) - 1)
_NUMBER = np.uint64(0xFFFFFFFF)
_RANK_BITS = np.uint64(32)


@dataclass(kw_only=True, slots=True)
class PartFacts:
    """One file of curated text."""

    name: FileName
    """Its name, `part-NNNNN.jsonl`."""
    bytes: Count
    """Its size in bytes."""
    documents: Annotated[int, Ge(0), Le((1 << 32) - 1)]
    """Number of its documents."""


@dataclass(kw_only=True, slots=True)
class SignatureIndex:
    """signatures/index.json."""

    format: Annotated[int, Ge(1), Le(1000)]
    """Version of the rows and of the hashes in them."""
    created_by: Line
    """Name and version of the program that wrote it."""
    near: bool
    """`curation.dedup.near`, and so on."""
    bands: Count
    band_hashes: Count
    shingle_words: Count
    shingle_chars: Count
    parts: Annotated[list[PartFacts], MaxLen(_MAX_PARTS)] = field(default_factory=list)
    """The files of curated text, in order."""
    output_sha256: Sha256
    """Hash over the hashes of these files, as `report.json` has it."""


_SAME = ("near", "bands", "band_hashes", "shingle_words", "shingle_chars")
"""Options with which the rows of two curations must have been made to be comparable."""


def index_of(
    dedup: DedupConfig, parts: list[PartFacts], output_sha256: str, created_by: str
) -> dict[str, Any]:
    """The content of index.json."""
    options = {name: getattr(dedup, name) for name in _SAME}
    index = SignatureIndex(
        format=FORMAT, created_by=created_by, parts=parts, output_sha256=output_sha256, **options
    )
    return asdict(index)


def rows_name(part: str) -> str:
    """Name of the file with the rows of a part."""
    return part.removesuffix(".jsonl") + ".rows"


@dataclass(frozen=True, slots=True)
class EarlierPart:
    """A file of curated text of an earlier curation, with its rows."""

    documents: Path
    signatures: Path
    n_documents: int

    @property
    def size_bytes(self) -> int:
        return self.signatures.stat().st_size

    def rows(self, dedup: DedupConfig) -> np.ndarray:
        """The rows of its documents, of which only those that are used are read."""
        if not self.n_documents:  # an empty file cannot be mapped
            return np.zeros(0, dtype=row_type(dedup))
        return np.memmap(self.signatures, dtype=row_type(dedup), mode="r", shape=(self.n_documents,))


def earlier_parts(dedup: DedupConfig, output: Path) -> list[EarlierPart]:
    """The parts of all earlier curations. Raises ConfigError where one cannot be compared with this one."""
    found = []
    for entry in dedup.against:
        folder = Path(entry).expanduser().resolve()
        where = f"curation.dedup.against={entry}"
        if folder == output:
            raise ConfigError(f"{where} is the output of this curation; choose another output")
        index = read_index(folder, where)
        wanted = {name: getattr(dedup, name) for name in _SAME}
        if index.format != FORMAT:
            raise ConfigError(
                f"{where} has signatures of format {index.format}, not {FORMAT}; curate it again"
            )
        for name, value in wanted.items():
            if (theirs := getattr(index, name)) != value:
                raise ConfigError(
                    f"{where} was curated with curation.dedup.{name}={theirs}, and this curation has {value}; "
                    "give the same value"
                )
        found += [_part(folder, part, where, row_type(dedup).itemsize) for part in index.parts]
    return found


def read_index(folder: Path, where: str) -> SignatureIndex:
    """The index of an earlier curation's signatures. Raises ConfigError."""
    path = folder / SIGNATURES / INDEX
    try:
        content = read_capped(path, _MAX_INDEX_BYTES)
    except OSError as error:
        if next((folder / DOCUMENTS).glob("part-*.parquet"), None):
            raise ConfigError(
                f"{where} was curated with output_format=parquet, which has no signatures; curate it again with "
                "output_format=jsonl"
            ) from None
        raise ConfigError(
            f"{where} holds no signatures ({path}: {error.strerror}); name the output folder of a curation"
        ) from None
    return parse(SignatureIndex, content, str(path), "an index of signatures", 4 * _MAX_PARTS + 100)


def _part(folder: Path, part: PartFacts, where: str, row_bytes: int) -> EarlierPart:
    documents, rows = folder / DOCUMENTS / part.name, folder / SIGNATURES / rows_name(part.name)
    for path, size in ((documents, part.bytes), (rows, part.documents * row_bytes)):
        if not path.is_file() or path.is_symlink() or path.stat().st_size != size:
            raise ConfigError(f"{where}: {path} is not a file of {size} bytes, as its index states")
    return EarlierPart(documents, rows, part.documents)


@dataclass(frozen=True, slots=True)
class Collection:
    """The documents of the tasks, in the order of the tasks, then those of earlier curations."""

    dedup: DedupConfig
    work: Path
    n_tasks: int
    """Number of tasks of this curation; the parts of earlier ones have the ranks after them."""
    earlier: list[EarlierPart]

    @property
    def n_ranks(self) -> int:
        return self.n_tasks + len(self.earlier)

    def rows(self, rank: int) -> np.ndarray:
        """The rows of a task or earlier part, of which only those that are used are read."""
        if rank < self.n_tasks:
            return load_array(rows_path(self.work, rank), mapped=True)
        return self.earlier[rank - self.n_tasks].rows(self.dedup)

    def is_earlier(self, documents: np.ndarray) -> np.ndarray:
        """Whether each document belongs to an earlier curation, and so stays: bool [documents]."""
        return documents >= np.uint64(self.n_tasks << 32)

    def facts(self, documents: np.ndarray, *names: str) -> np.ndarray:
        """The named fields of the documents' rows."""
        dtype = row_type(self.dedup)
        found = np.zeros(len(documents), dtype=[(name, dtype[name]) for name in names])
        for rank, places in self._by_rank(documents):
            rows = self.rows(rank)
            numbers = documents[places] & _NUMBER
            for name in names:
                found[name][places] = rows[name][numbers]
        return found

    def order(self, hashes: np.ndarray, documents: np.ndarray, *first: np.ndarray) -> np.ndarray:
        """The order that sorts by hash, then the documents that are preferred first; `first` decide before that."""
        preferences = self.facts(documents, "preference")["preference"].astype(np.int64)
        preferences[self.is_earlier(documents)] = -1
        return np.lexsort((documents, preferences, *reversed(first), hashes))

    def lines(self, documents: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        """(document, its content) of the documents, which are sorted. Raises ConfigError for a broken file."""
        offsets = self.facts(documents, "line_bytes")["line_bytes"]
        for rank, places in self._by_rank(documents):
            path = self._file(rank)
            with path.open("rb") as file:
                for place in places.tolist():
                    yield int(documents[place]), _content_at(file, int(offsets[place]), path)

    def where(self, document: int) -> dict[str, str]:
        """The folder of the earlier curation that a document belongs to; empty for one of this curation."""
        rank = document >> 32
        return {} if rank < self.n_tasks else {"against": str(self._file(rank).parent.parent)}

    def _file(self, rank: int) -> Path:
        if rank < self.n_tasks:
            return self.work / "kept" / f"{rank:05d}.jsonl"
        return self.earlier[rank - self.n_tasks].documents

    @staticmethod
    def _by_rank(documents: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Each rank that occurs, and the places of its documents."""
        ranks = documents >> _RANK_BITS
        order = np.argsort(ranks, kind="stable")
        sorted_ranks = ranks[order]
        begins = np.flatnonzero(np.diff(sorted_ranks, prepend=_NO_RANK))
        for start, stop in pairwise([*begins.tolist(), len(order)]):
            yield int(sorted_ranks[start]), order[start:stop]


def _content_at(file: BinaryIO, offset: int, path: Path) -> dict[str, Any]:
    wrong = f"{path} has no document at byte {offset}, where its signatures have one; curate it again"
    if offset > path.stat().st_size:
        raise ConfigError(wrong)
    file.seek(offset)
    line = file.readline(_MAX_LINE_BYTES)
    content = parse_plain(line, str(path), "curated text", _MAX_LINE_VALUES)
    if not isinstance(content, dict) or not all(
        isinstance(content.get(name), str) for name in ("id", "text", "source")
    ):
        raise ConfigError(wrong)
    return content
