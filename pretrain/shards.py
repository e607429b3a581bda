"""The on-disk contract of a corpus: random access to its tokens, and verifying them (`corpus_writer.py` writes).

A corpus is a folder of webdataset tar shards and one `manifest.json`:

    manifest.json                 what is there, and a hash of all of it (`Manifest`)
    shards/shard-00000.tar        members NNNNNN.tok (a chunk: little-endian tokens) and NNNNNN.doc (JSON)
    shards/shard-00000.idx        where each member lies and its xxh3-64, as a .npy array
    shards/ids.npy                uint64 [documents, 2]: xxh3-64 of each document's id, ascending, and its first chunk

Documents, [bos] tokens [eos] each, are concatenated and cut into chunks of `chunk_tokens`; only the
last chunk of a corpus may be shorter. NNNNNN is the number of the chunk in the corpus. A `.doc` member
describes the pieces of documents in its chunk: `starts` (token offset in the chunk), `source` (index into
the manifest's sources), `ids` (document ids), `offsets` (the piece's first token, counted within its
document: 0 unless it is a continuation), `text_bytes` (UTF-8 bytes of the document's text, given with its
first piece, else 0).

Where the manifest says `loss_mask`, only some tokens are to be predicted, and a `.doc` member has two lists more:
`targets` ([start, stop, start, stop, ...], token offsets in the chunk, ascending) and `target_bytes` (UTF-8 bytes of
the text that the document's targets stand for, given with its first piece, else 0).
"""

from __future__ import annotations

import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pretrain.config import ConfigError
from pretrain.manifest import (
    DOCUMENTS,
    TOKENS,
    CorruptShardError,
    FileInfo,
    Manifest,
    describe_file,
    header_problem,
    load_manifest,
    member_name,
    read_index,
    resolve_inside,
)

SHARDS_FOLDER = "shards"
IDS_NAME = f"{SHARDS_FOLDER}/ids.npy"
_OPEN_SHARDS = 64  # file descriptors that one Corpus holds at most
_CACHED_DOCUMENTS = 512  # parsed .doc members that one Corpus holds at most
_BLOCK = tarfile.BLOCKSIZE

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


@dataclass(frozen=True, slots=True)
class ChunkDocuments:
    """The pieces of documents in one chunk; every field but `targets` has one entry per piece."""

    starts: np.ndarray  # int64: token offset in the chunk; the first is 0
    source: np.ndarray  # int64: index into the manifest's sources
    ids: list[str]
    offsets: np.ndarray  # int64: the piece's first token within its document
    text_bytes: np.ndarray  # int64: of the document, where offsets is 0, else 0
    targets: np.ndarray | None = None  # int64 [2 n]: start, stop, ... of what is predicted; None: all is
    target_bytes: np.ndarray | None = None  # int64: of the document's targets, where offsets is 0, else 0


class Corpus:
    """Random access to the tokens of a corpus.

    Shards and indexes are opened at first use. Can be sent to a process, and used after a fork. With `verify_chunks`
    the hash of a chunk is checked at its first use in this process. Raises CorruptShardError where the manifest's
    root hash is not `root_sha256`, if given.
    """

    def __init__(
        self, manifest_path: str | Path, verify_chunks: bool = True, root_sha256: str | None = None
    ) -> None:
        self.manifest_path = Path(manifest_path)
        self.verify_chunks = verify_chunks
        self.manifest = load_manifest(manifest_path)
        if root_sha256 not in (None, self.manifest.root_sha256):
            raise CorruptShardError(
                f"{manifest_path} is another corpus than the one begun with; put that back"
            )
        self.n_chunks = self.manifest.n_chunks
        self.chunk_tokens = self.manifest.chunk_tokens
        self.last_chunk_tokens = self.manifest.last_chunk_tokens
        self._dtype = np.dtype(self.manifest.dtype)
        self._first_chunks = np.array([shard.first_chunk for shard in self.manifest.shards])
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._documents: OrderedDict[int, ChunkDocuments] = OrderedDict()
        self._verified = np.zeros(self.n_chunks, dtype=bool)

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to another process as its name: one that is killed before it has read more than the 64 KiB that a
        pipe holds would keep its starter waiting for ever."""
        return Corpus, (self.manifest_path, self.verify_chunks, self.manifest.root_sha256)

    def tokens_in(self, chunk: int) -> int:
        """Number of tokens of a chunk."""
        return self.last_chunk_tokens if chunk == self.n_chunks - 1 else self.chunk_tokens

    def read(self, chunk: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a chunk, `stop` clipped to its end; an array of the manifest's dtype.

        Raises CorruptShardError, and IndexError for a chunk or start that does not exist.
        """
        stop = min(stop, self.tokens_in(chunk))
        if not (0 <= chunk < self.n_chunks and 0 <= start <= stop):
            raise IndexError(f"{self.manifest_path}: no tokens {start} to {stop} in chunk {chunk}")
        shard, row = self._locate(chunk)
        width = self._dtype.itemsize
        if self.verify_chunks and not self._verified[chunk]:
            content = shard.member(row, TOKENS)
            self._verified[chunk] = True
            content = content[start * width : stop * width]
        else:
            content = shard.read(row, TOKENS, start * width, stop * width)
        return np.frombuffer(content, dtype=self._dtype.newbyteorder("<")).astype(self._dtype)

    def documents(self, chunk: int) -> ChunkDocuments:
        """The document pieces of a chunk. Raises CorruptShardError, and IndexError for an unknown chunk."""
        if not 0 <= chunk < self.n_chunks:
            raise IndexError(f"{self.manifest_path}: no chunk {chunk}")
        if chunk in self._documents:
            self._documents.move_to_end(chunk)
            return self._documents[chunk]
        shard, row = self._locate(chunk)
        where = f"{shard.path}: {member_name(chunk, DOCUMENTS)}"
        content, masked = shard.member(row, DOCUMENTS), self.manifest.loss_mask
        documents = _parse_documents(content, where, self.tokens_in(chunk), masked)
        self._documents[chunk] = documents
        if len(self._documents) > _CACHED_DOCUMENTS:
            self._documents.popitem(last=False)
        return documents

    def chunks_of(self, document_id: str) -> list[int]:
        """The chunks that hold a document, or several of one id; empty: there is none.

        Raises ConfigError where the corpus is older than its index of ids.
        """
        try:
            rows = np.load(self.manifest_path.parent / IDS_NAME, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise ConfigError(
                f"{self.manifest_path.parent} has no {IDS_NAME}, which finds documents by their id; prepare the corpus "
                "again with this program"
            ) from error
        wanted = np.uint64(hash_id(document_id))
        first, end = (int(np.searchsorted(rows[:, 0], wanted, side=side)) for side in ("left", "right"))
        found: list[int] = []
        for chunk in sorted(set(rows[first:end, 1].astype(int).tolist())):
            while chunk < self.n_chunks and document_id in self.documents(chunk).ids:
                found.append(chunk)
                if self.documents(chunk).ids[-1] != document_id:
                    break
                chunk += 1  # it may go on there
        return sorted(set(found))

    def is_target(self, chunk: int, start: int, stop: int) -> np.ndarray:
        """Whether the tokens [start, stop) of a chunk are to be predicted: bool [stop - start], all true without a
        loss mask, false behind the chunk's end with one. Raises as `documents` does."""
        if not self.manifest.loss_mask:
            return np.ones(stop - start, np.bool_)
        targets = self.documents(chunk).targets
        assert targets is not None
        # A token behind an odd number of starts and stops lies within a target.
        return targets.searchsorted(np.arange(start, stop), side="right") % 2 == 1

    def _locate(self, chunk: int) -> tuple[_OpenShard, int]:
        number = int(np.searchsorted(self._first_chunks, chunk, side="right")) - 1
        info = self.manifest.shards[number]
        if number in self._open:
            self._open.move_to_end(number)
        else:
            self._open[number] = _OpenShard(self.manifest_path.parent / SHARDS_FOLDER, self.manifest, number)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        return self._open[number], chunk - info.first_chunk


def hash_id(document_id: str) -> int:
    """xxh3-64 of a document's id."""
    return xxhash.xxh3_64_intdigest(document_id.encode("utf-8", "surrogatepass"))


class _OpenShard:
    """One shard with its index in memory. Reads by position, so that forked processes do not disturb it.

    Not memory-mapped: there a failing disk or network file system kills the process, here it is an error.
    """

    def __init__(self, folder: Path, manifest: Manifest, number: int) -> None:
        self._descriptor = -1
        self.info = info = manifest.shards[number]
        self.path = resolve_inside(folder, info.name)
        self.index = read_index(folder, manifest, number)
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            size = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise CorruptShardError(f"{self.path} cannot be opened: {error.strerror}") from error
        if size != info.bytes:
            raise CorruptShardError(self._size_problem(size))

    def _size_problem(self, size: int) -> str:
        ends = self.index[:, :, 0] + self.index[:, :, 1]  # uint64 [chunks, 2]
        lost = np.argwhere(ends > size)
        first = f"; the first member cut off is {self.member_name(*lost[0].tolist())}" if len(lost) else ""
        return f"{self.path} has {size} bytes, its manifest says {self.info.bytes}{first}"

    def member_name(self, row: int, kind: int) -> str:
        return member_name(self.info.first_chunk + row, kind)

    def read(self, row: int, kind: int, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a member, which are not checked."""
        offset = int(self.index[row, kind, 0])
        try:
            content = os.pread(self._descriptor, stop - start, offset + start)
        except OSError as error:
            raise CorruptShardError(
                f"{self.path}: member {self.member_name(row, kind)} cannot be read: {error.strerror}"
            ) from error
        if len(content) != stop - start:
            raise CorruptShardError(f"{self.path}: member {self.member_name(row, kind)} is cut off")
        return content

    def member(self, row: int, kind: int) -> bytes:
        """A whole member, its hash checked."""
        content = self.read(row, kind, 0, int(self.index[row, kind, 1]))
        expected, found = int(self.index[row, kind, 2]), xxhash.xxh3_64_intdigest(content)
        if found != expected:
            raise CorruptShardError(
                f"{self.path}: member {self.member_name(row, kind)} has xxh3-64 {found:016x}, its index says "
                f"{expected:016x}; restore the file or prepare the corpus again"
            )
        return content

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A document as a corpus holds it."""

    source: str
    id: str
    tokens: np.ndarray
    text_bytes: int
    is_target: np.ndarray | None  # bool [tokens]: what is to be predicted; None without a loss mask: all
    target_bytes: int


def documents_of(corpus: Corpus) -> Iterator[StoredDocument]:
    """Every document in its place, put together from its pieces. Raises CorruptShardError."""
    parts: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    head: tuple[str, str] = ("", "")
    text_bytes = target_bytes = 0

    def document() -> StoredDocument:
        mask = np.concatenate(masks) if corpus.manifest.loss_mask else None
        return StoredDocument(*head, np.concatenate(parts), text_bytes, mask, target_bytes)

    for chunk in range(corpus.n_chunks):
        pieces, n_tokens = corpus.documents(chunk), corpus.tokens_in(chunk)
        tokens = np.split(corpus.read(chunk, 0, n_tokens), pieces.starts[1:])
        are_targets = np.split(corpus.is_target(chunk, 0, n_tokens), pieces.starts[1:])
        for row, document_id in enumerate(pieces.ids):
            if pieces.offsets[row] == 0:
                if parts:
                    yield document()
                parts, masks = [], []
                head = (corpus.manifest.sources[pieces.source[row]].name, document_id)
                text_bytes = int(pieces.text_bytes[row])
                target_bytes = 0 if pieces.target_bytes is None else int(pieces.target_bytes[row])
            parts.append(tokens[row])
            masks.append(are_targets[row])
    yield document()


def _parse_documents(content: bytes, where: str, n_tokens: int, masked: bool) -> ChunkDocuments:
    try:
        raw: dict[str, Any] = json.loads(content)
        arrays: dict[str, Any] = {k: np.array(v, np.int64) for k, v in raw.items() if k != "ids"}
        found = ChunkDocuments(ids=raw["ids"], **arrays)
        per_piece = [value for name, value in arrays.items() if name != "targets"]
        if len({len(value) for value in (found.ids, *per_piece)}) != 1:
            raise ValueError("its lists differ in length")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CorruptShardError(f"{where} is no list of documents; prepare the corpus again") from error
    problem = _targets_problem(found, n_tokens, masked)
    if problem is not None:
        raise CorruptShardError(f"{where} {problem}; prepare the corpus again")
    return found


def _targets_problem(found: ChunkDocuments, n_tokens: int, masked: bool) -> str | None:
    """What is wrong with the loss mask of a chunk of `n_tokens`; None: nothing."""
    targets = found.targets
    if (targets is not None) is not masked or (found.target_bytes is not None) is not masked:
        return f"has {'no' if masked else 'a'} loss mask, where its manifest says otherwise"
    if targets is None:
        return None
    if targets.ndim != 1 or len(targets) % 2 or (np.diff(targets) < 0).any():
        return "has targets that are no ascending pairs of start and stop"
    if (targets[::2] == targets[1::2]).any() or (
        len(targets) and not 0 <= targets[0] <= targets[-1] <= n_tokens
    ):
        return f"has targets that are empty or outside of the chunk's {n_tokens} tokens"
    return None


def verify_corpus(manifest_path: str | Path, progress: Progress | None = None) -> list[str]:
    """Read every file of a corpus and compare it with the manifest.

    Returns every problem found, each one sentence that names the file and the member; empty: all is well.
    """
    try:
        manifest = load_manifest(manifest_path)
    except ConfigError as error:
        return [str(error)]
    folder = Path(manifest_path).parent
    expected = [FileInfo(f"{SHARDS_FOLDER}/{s.name}", s.bytes, s.sha256) for s in manifest.shards]
    total, done = sum(file.bytes for file in expected + manifest.files), 0
    problems = []
    for number, file in enumerate(expected + manifest.files):
        found = _file_problems(folder, file)
        if number < len(expected):
            found += _member_problems(folder / SHARDS_FOLDER, manifest, number, damaged=bool(found))
        problems += found
        done += file.bytes
        if progress is not None:
            progress(done, total)
    named = {shard.name for shard in manifest.shards}
    foreign = [p for p in sorted((folder / SHARDS_FOLDER).glob("*.tar")) if p.name not in named]
    return problems + [f"{p} is not in the manifest; remove it" for p in foreign]


def _file_problems(folder: Path, expected: FileInfo) -> list[str]:
    try:
        path = resolve_inside(folder, expected.name)
        found = describe_file(folder, expected.name)
    except CorruptShardError as error:
        return [str(error)]
    except OSError as error:
        return [f"{path} cannot be read: {error.strerror}"]
    if found.bytes != expected.bytes:
        return [f"{path} has {found.bytes} bytes, the manifest says {expected.bytes}"]
    if found.sha256 != expected.sha256:
        return [f"{path} has sha256 {found.sha256}, the manifest says {expected.sha256}"]
    return []


def _member_problems(folder: Path, manifest: Manifest, number: int, damaged: bool) -> list[str]:
    """Whether the index is whole, each tar header is as it says, and each loss mask marks tokens of its chunk; for a
    damaged shard, each member that differs."""
    info = manifest.shards[number]
    try:
        index = read_index(folder, manifest, number)
        content = resolve_inside(folder, info.name).open("rb")
    except CorruptShardError as error:
        return [str(error)]
    except OSError:  # said already
        return []
    problems = []
    with content:
        for row, kind in np.ndindex(*index.shape[:2]):
            offset, length, digest = (int(value) for value in index[row, kind])
            name = member_name(info.first_chunk + row, kind)
            content.seek(offset - _BLOCK)
            what = header_problem(content.read(_BLOCK), name, length)
            if damaged:
                member = content.read(length)
                if len(member) < length:
                    what = "is cut off"
                elif xxhash.xxh3_64_intdigest(member) != digest:
                    what = "has another xxh3-64 than its index says"
            elif kind == DOCUMENTS and manifest.loss_mask:
                is_last = info.first_chunk + row == manifest.n_chunks - 1
                n_tokens = manifest.last_chunk_tokens if is_last else manifest.chunk_tokens
                try:
                    _parse_documents(
                        content.read(length), f"{folder / info.name}: {name}", n_tokens, masked=True
                    )
                except CorruptShardError as error:
                    problems.append(str(error))
            if what is not None:
                problems.append(f"{folder / info.name}: member {name} {what}")
    return problems
