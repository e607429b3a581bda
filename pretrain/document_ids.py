"""Finding a document by its id: a sorted index that comes with a corpus, searched where it lies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import xxhash

from pretrain.config import ConfigError
from pretrain.manifest import FileInfo
from pretrain.remote import folder_of, read_range
from pretrain.shards import SHARDS_FOLDER, Corpus

IDS_NAME = f"{SHARDS_FOLDER}/ids.npy"
_ROW_BYTES = 16
_HEADER_BYTES = 128  # of a .npy array
_BLOCK_ROWS = 4096  # read at a time

Rows = np.ndarray  # uint64 [n, 2]: hash of the id, first chunk


def hash_id(document_id: str) -> int:
    """xxh3-64 of a document's id."""
    return xxhash.xxh3_64_intdigest(document_id.encode("utf-8", "surrogatepass"))


def chunks_of(corpus: Corpus, document_id: str) -> list[int]:
    """The chunks that hold a document, or several of one id; empty: there is none.

    Raises ConfigError where the corpus is older than its index of ids, and as reading does.
    """
    listed = [file for file in corpus.manifest.files if file.name == IDS_NAME]
    if not listed:
        raise ConfigError(
            f"{corpus.manifest_path} has no {IDS_NAME}, which finds documents by their id; prepare the corpus again "
            "with this program"
        )
    wanted, n_rows = hash_id(document_id), (listed[0].bytes - _HEADER_BYTES) // _ROW_BYTES
    read = partial(_read_rows, corpus, listed[0])
    low, high = 0, n_rows  # the first row with the wanted hash, or what would follow it, is in [low, high]
    while high - low > _BLOCK_ROWS:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if int(read(middle, middle + 1)[0, 0]) < wanted else (low, middle)
    return _chunks_from(corpus, document_id, _equal_rows(read, low, n_rows, wanted))


def _read_rows(corpus: Corpus, file: FileInfo, first: int, stop: int) -> Rows:
    """Rows [first, stop) of the index."""
    start, end = (_HEADER_BYTES + row * _ROW_BYTES for row in (first, stop))
    place = folder_of(corpus.manifest_path)

    def size_problem(content: bytes) -> str | None:
        return None if len(content) == end - start else f"{file.name} is cut off"

    if isinstance(place, str):
        content = read_range(f"{place}/{file.name}", start, end, corpus.options.read_timeout_s, size_problem)
    else:
        with (place / file.name).open("rb") as rows:
            rows.seek(start)
            content = rows.read(end - start)
    return np.frombuffer(content, "<u8").reshape(-1, 2)


def _equal_rows(read: Callable[[int, int], Rows], low: int, n_rows: int, wanted: int) -> list[int]:
    """The chunks of all rows with the wanted hash, the first of which is within a block from `low`."""
    chunks: list[int] = []
    while low < n_rows:
        rows = read(low, min(low + _BLOCK_ROWS + 1, n_rows))
        chunks += rows[rows[:, 0] == wanted, 1].astype(int).tolist()
        if int(rows[-1, 0]) > wanted:
            break
        low += len(rows)
    return chunks


def _chunks_from(corpus: Corpus, document_id: str, begins: list[int]) -> list[int]:
    """The chunks in which the documents begin, and those in which they go on."""
    found = set()
    for chunk in sorted(set(begins)):
        while chunk < corpus.n_chunks and document_id in corpus.documents(chunk).ids:
            found.add(chunk)
            if corpus.documents(chunk).ids[-1] != document_id:
                break
            chunk += 1
    return sorted(found)
