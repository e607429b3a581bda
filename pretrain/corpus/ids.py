"""Finds a document by its id, with a binary search in the sorted index that comes with a corpus (`shards/ids.npy`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import BinaryIO

import numpy as np
import xxhash

from pretrain.corpus.manifest import (
    NPY_HEADER_BYTES,
    CorruptShardError,
    FileInfo,
    Manifest,
    npy_header,
    open_member,
)
from pretrain.corpus.shards import SHARDS_FOLDER, Corpus
from pretrain.errors import ConfigError
from pretrain.remote import folder_of, read_range

IDS_NAME = f"{SHARDS_FOLDER}/ids.npy"
_ROW_BYTES = 16
_BLOCK_ROWS = 4096  # number of rows that are read at a time

Rows = np.ndarray  # uint64 [n, 2]: the hash of a document's id, and the document's first chunk


def hash_id(document_id: str) -> int:
    """xxh3-64 of a document's id."""
    return xxhash.xxh3_64_intdigest(document_id.encode("utf-8", "surrogatepass"))


def hash_ids(document_ids: list[str]) -> np.ndarray:
    """`hash_id` of each id: uint64 [ids]."""
    digest = xxhash.xxh3_64_intdigest
    return np.array([digest(name.encode("utf-8", "surrogatepass")) for name in document_ids], np.uint64)


def chunks_of(corpus: Corpus, document_id: str) -> list[int]:
    """The chunks that hold the document with this id, or all documents with this id; empty where there is none.

    Raises ConfigError where the corpus is too old to have an index of ids, CorruptShardError where the index is
    damaged, and the errors of `Corpus.documents`.
    """
    listed = [file for file in corpus.manifest.files if file.name == IDS_NAME]
    if not listed:
        raise ConfigError(
            f"{corpus.manifest_path} has no {IDS_NAME}, which is needed to find documents by their id; prepare the "
            "corpus again with this program"
        )
    wanted, n_rows = hash_id(document_id), corpus.manifest.n_documents
    if listed[0].bytes != NPY_HEADER_BYTES + n_rows * _ROW_BYTES:
        raise CorruptShardError(f"{corpus.manifest_path}: {IDS_NAME} does not list {n_rows} documents")
    read = partial(_read_rows, corpus, listed[0])
    low, high = 0, n_rows  # the first row whose hash is at least the wanted one is in [low, high]
    while high - low > _BLOCK_ROWS:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if int(read(middle, middle + 1)[0, 0]) < wanted else (low, middle)
    begins = _equal_rows(read, low, n_rows, wanted)
    if not all(0 <= chunk < corpus.n_chunks for chunk in begins):
        raise CorruptShardError(f"{corpus.manifest_path}: {IDS_NAME} names a chunk that does not exist")
    return _chunks_from(corpus, document_id, begins)


def ids_problem(file: BinaryIO, manifest: Manifest) -> str | None:
    """What is wrong with the index of ids in an open file; None where it is valid."""
    file.seek(0)
    if file.read(NPY_HEADER_BYTES) != npy_header((manifest.n_documents, 2)):
        return f"is not an index of {manifest.n_documents} documents; prepare the corpus again"
    last = 0
    while block := file.read(_BLOCK_ROWS * _ROW_BYTES):
        rows = parse_ids(block)
        if rows is None or rows[0, 0] < last or (rows[1:, 0] < rows[:-1, 0]).any():
            return "is not in ascending order; prepare the corpus again"
        if (rows[:, 1] >= manifest.n_chunks).any():
            return "names a chunk that does not exist; prepare the corpus again"
        last = rows[-1, 0]
    return None


def parse_ids(content: bytes) -> Rows | None:
    """Rows of the index; None where `content` is not a whole number of rows."""
    return np.frombuffer(content, "<u8").reshape(-1, 2) if len(content) % _ROW_BYTES == 0 else None


def _read_rows(corpus: Corpus, file: FileInfo, first: int, stop: int) -> Rows:
    """Rows [first, stop) of the index."""
    start, end = (NPY_HEADER_BYTES + row * _ROW_BYTES for row in (first, stop))
    place = folder_of(corpus.manifest_path)

    def size_problem(content: bytes) -> str | None:
        return None if len(content) == end - start else f"{file.name} is cut off"

    if isinstance(place, str):
        content = read_range(f"{place}/{file.name}", start, end, corpus.options.read_timeout_s, size_problem)
    else:
        try:
            with open_member(place, file.name) as index:
                index.seek(start)
                content = index.read(end - start)
        except OSError as error:
            raise CorruptShardError(f"{place / file.name} cannot be read: {error.strerror}") from error
        if (problem := size_problem(content)) is not None:
            raise CorruptShardError(f"{place}: {problem}")
    return np.frombuffer(content, "<u8").reshape(-1, 2)


def _equal_rows(read: Callable[[int, int], Rows], low: int, n_rows: int, wanted: int) -> list[int]:
    """The chunks in all rows with the wanted hash. The first such row is at most one block after row `low`."""
    chunks: list[int] = []
    while low < n_rows:
        rows = read(low, min(low + _BLOCK_ROWS + 1, n_rows))
        chunks += rows[rows[:, 0] == wanted, 1].tolist()
        if int(rows[-1, 0]) > wanted:
            break
        low += len(rows)
    return chunks


def _chunks_from(corpus: Corpus, document_id: str, begins: list[int]) -> list[int]:
    """The chunks in which documents with this id begin, and those in which they continue.

    `begins` may hold chunks of other ids with the same hash; these are left out.
    """
    found = set()
    for chunk in sorted(set(begins)):
        while chunk < corpus.n_chunks and document_id in corpus.documents(chunk).ids:
            found.add(chunk)
            if corpus.documents(chunk).ids[-1] != document_id:
                break
            chunk += 1
    return sorted(found)
