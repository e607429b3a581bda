"""The on-disk contract of a corpus: random access to its tokens, and verifying them (`corpus_writer.py` writes).

A corpus is a folder of webdataset tar shards and one `manifest.json`:

    manifest.json                 what is there, and a hash of all of it (`Manifest`)
    shards/shard-00000.tar        members NNNNNN.tok (a chunk: little-endian tokens) and NNNNNN.doc (JSON)
    shards/shard-00000.idx        where each member lies and its xxh3-64, as a .npy array

Documents, [bos] tokens [eos] each, are concatenated and cut into chunks of `chunk_tokens`; only the
last chunk of a corpus may be shorter. NNNNNN is the number of the chunk in the corpus. A `.doc` member
describes the pieces of documents in its chunk: `starts` (token offset in the chunk), `source` (index into
the manifest's sources), `ids` (document ids), `offsets` (the piece's first token, counted within its
document: 0 unless it is a continuation), `text_bytes` (UTF-8 bytes of the document's text, given with its
first piece, else 0).
"""

from __future__ import annotations

import errno
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
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
from pretrain.remote import ReadOptions, as_path, folder_of, redact, retry_local
from pretrain.remote_chunks import RemoteChunks, load_remote_manifest

SHARDS_FOLDER = "shards"
_OPEN_SHARDS = 64  # file descriptors that one Corpus holds at most
_CACHED_DOCUMENTS = 512  # parsed .doc members that one Corpus holds at most
_BLOCK = tarfile.BLOCKSIZE

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


@dataclass(frozen=True, slots=True)
class ChunkDocuments:
    """The pieces of documents in one chunk; every field has one entry per piece."""

    starts: np.ndarray  # int64: token offset in the chunk; the first is 0
    source: np.ndarray  # int64: index into the manifest's sources
    ids: list[str]
    offsets: np.ndarray  # int64: the piece's first token within its document
    text_bytes: np.ndarray  # int64: of the document, where offsets is 0, else 0


class Corpus:
    """Random access to the tokens of a corpus, on a disk or behind any fsspec URL.

    Shards and indexes are opened at first use. Can be sent to a process, and used after a fork. With `verify_chunks`
    the hash of a chunk is checked at its first use in this process (always, where it comes from a URL). Raises
    CorruptShardError where the manifest's root hash is not `root_sha256`, if given.
    """

    def __init__(
        self,
        manifest_path: str | Path,
        verify_chunks: bool = True,
        root_sha256: str | None = None,
        options: ReadOptions | None = None,
    ) -> None:
        self.manifest_path = as_path(manifest_path)
        self.verify_chunks = verify_chunks
        self.options = options or ReadOptions()
        if isinstance(self.manifest_path, str):
            self.manifest = load_remote_manifest(self.manifest_path, self.options, root_sha256)
        else:
            self.manifest = load_manifest(self.manifest_path)
        if root_sha256 not in (None, self.manifest.root_sha256):
            raise CorruptShardError(
                f"{redact(str(manifest_path))} is another corpus than the one begun with; put that back"
            )
        self.n_chunks = self.manifest.n_chunks
        self.chunk_tokens = self.manifest.chunk_tokens
        self.last_chunk_tokens = self.manifest.last_chunk_tokens
        self._dtype = np.dtype(self.manifest.dtype)
        self._first_chunks = np.array([shard.first_chunk for shard in self.manifest.shards])
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._documents: OrderedDict[int, ChunkDocuments] = OrderedDict()
        self._verified = np.zeros(self.n_chunks, dtype=bool)
        self._remote: RemoteChunks | None = None
        if isinstance(self.manifest_path, str):
            self._remote = self._new_remote()

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to another process as its name: one that is killed before it has read more than the 64 KiB that a
        pipe holds would keep its starter waiting for ever."""
        return Corpus, (self.manifest_path, self.verify_chunks, self.manifest.root_sha256, self.options)

    def _new_remote(self) -> RemoteChunks:
        return RemoteChunks(f"{folder_of(self.manifest_path)}/{SHARDS_FOLDER}", self.manifest, self.options)

    def prefetch(self, chunks: Sequence[int]) -> None:
        """Begin to fetch chunks that will soon be read, in this order; at most `data.prefetch_chunks` at a time.

        Returns at once. Where it fails, `read` tries again and raises. Nothing to do for a corpus on a disk.
        """
        if self._remote is not None:
            self._here(self._remote).prefetch(chunks)

    def _here(self, remote: RemoteChunks) -> RemoteChunks:
        """The reader of this process: threads and connections do not live on in a forked child."""
        if remote.pid != os.getpid():
            remote = self._remote = self._new_remote()
        return remote

    def tokens_in(self, chunk: int) -> int:
        """Number of tokens of a chunk."""
        return self.last_chunk_tokens if chunk == self.n_chunks - 1 else self.chunk_tokens

    def read(self, chunk: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a chunk, `stop` clipped to its end; an array of the manifest's dtype.

        Raises CorruptShardError, IndexError for a chunk or start that does not exist, and, behind a URL, ReadError
        where the store is away for longer than `data.read_timeout_s`.
        """
        stop = min(stop, self.tokens_in(chunk))
        if not (0 <= chunk < self.n_chunks and 0 <= start <= stop):
            raise IndexError(f"{self.manifest_path}: no tokens {start} to {stop} in chunk {chunk}")
        width = self._dtype.itemsize
        try:
            content = self._token_bytes(chunk, start * width, stop * width)
        except CorruptShardError as error:
            error.source_path, error.chunk = str(self.manifest_path), chunk
            raise
        return np.frombuffer(content, dtype=self._dtype.newbyteorder("<")).astype(self._dtype)

    def documents(self, chunk: int) -> ChunkDocuments:
        """The document pieces of a chunk. Raises CorruptShardError, and IndexError for an unknown chunk."""
        if not 0 <= chunk < self.n_chunks:
            raise IndexError(f"{self.manifest_path}: no chunk {chunk}")
        if chunk in self._documents:
            self._documents.move_to_end(chunk)
            return self._documents[chunk]
        try:
            where, content = self._document_bytes(chunk)
            documents = self._documents[chunk] = _parse_documents(content, where)
        except CorruptShardError as error:
            error.source_path, error.chunk = str(self.manifest_path), chunk
            raise
        if len(self._documents) > _CACHED_DOCUMENTS:
            self._documents.popitem(last=False)
        return documents

    def _token_bytes(self, chunk: int, start: int, stop: int) -> bytes:
        if self._remote is not None:
            return self._here(self._remote).read(chunk, TOKENS, start, stop)
        shard, row = self._locate(chunk)
        if self.verify_chunks and not self._verified[chunk]:
            content = shard.member(row, TOKENS)
            self._verified[chunk] = True
            return content[start:stop]
        return shard.read(row, TOKENS, start, stop)

    def _document_bytes(self, chunk: int) -> tuple[str, bytes]:
        """Where a .doc member lies, in words, and the member."""
        if self._remote is not None:
            where = f"{redact(str(self.manifest_path))}: {member_name(chunk, DOCUMENTS)}"
            return where, self._here(self._remote).read(chunk, DOCUMENTS, 0)
        shard, row = self._locate(chunk)
        return f"{shard.path}: {member_name(chunk, DOCUMENTS)}", shard.member(row, DOCUMENTS)

    def _locate(self, chunk: int) -> tuple[_OpenShard, int]:
        number = int(np.searchsorted(self._first_chunks, chunk, side="right")) - 1
        info = self.manifest.shards[number]
        if number in self._open:
            self._open.move_to_end(number)
        else:
            folder = Path(self.manifest_path).parent / SHARDS_FOLDER
            self._open[number] = _OpenShard(folder, self.manifest, number)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        return self._open[number], chunk - info.first_chunk


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
            self._descriptor, size = retry_local(self._open)
        except OSError as error:
            raise CorruptShardError(f"{self.path} cannot be opened: {error.strerror}") from error
        if size != info.bytes:
            raise CorruptShardError(self._size_problem(size))

    def _open(self) -> tuple[int, int]:
        """A descriptor, and the file's size."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return descriptor, os.fstat(descriptor).st_size
        except OSError:
            os.close(descriptor)
            raise

    def _size_problem(self, size: int) -> str:
        ends = self.index[:, :, 0] + self.index[:, :, 1]  # uint64 [chunks, 2]
        lost = np.argwhere(ends > size)
        first = f"; the first member cut off is {self.member_name(*lost[0].tolist())}" if len(lost) else ""
        return f"{self.path} has {size} bytes, its manifest says {self.info.bytes}{first}"

    def member_name(self, row: int, kind: int) -> str:
        return member_name(self.info.first_chunk + row, kind)

    def read(self, row: int, kind: int, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a member, which are not checked."""
        offset, size = int(self.index[row, kind, 0]) + start, stop - start
        try:
            content = os.pread(self._descriptor, size, offset)
        except OSError:
            content = b""
        if len(content) == size:
            return content
        try:
            return retry_local(lambda: self._read_anew(offset, size))
        except OSError as error:
            raise CorruptShardError(
                f"{self.path}: member {self.member_name(row, kind)} cannot be read: {error.strerror}"
            ) from error

    def _read_anew(self, offset: int, size: int) -> bytes:
        """Of the file opened again: what a handle is stale for, or a cache holds half of, is whole there."""
        descriptor, _ = self._open()
        try:
            content = os.pread(descriptor, size, offset)
            if len(content) != size:
                raise OSError(errno.EIO, f"it is cut off, {len(content)} of {size} bytes are there")
            os.dup2(descriptor, self._descriptor, inheritable=False)
        finally:
            os.close(descriptor)
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


def _parse_documents(content: bytes, where: str) -> ChunkDocuments:
    try:
        raw: dict[str, Any] = json.loads(content)
        arrays: dict[str, Any] = {k: np.array(v, np.int64) for k, v in raw.items() if k != "ids"}
        found = ChunkDocuments(ids=raw["ids"], **arrays)
        if len({len(value) for value in (found.ids, *arrays.values())}) != 1:
            raise ValueError("its lists differ in length")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CorruptShardError(f"{where} is no list of documents; prepare the corpus again") from error
    return found


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
    """Whether the index is whole, each tar header is as it says and, for a damaged shard, each member that differs."""
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
            if what is not None:
                problems.append(f"{folder / info.name}: member {name} {what}")
    return problems
