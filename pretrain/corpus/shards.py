"""The on-disk format of a corpus, and random access to its tokens. `writer.py` writes the format.

A corpus is a folder of webdataset tar shards and one `manifest.json`:

    manifest.json                 the list of all files with their hashes, and a root hash of that list (`Manifest`)
    shards/shard-00000.tar        members NNNNNN.tok (a chunk: little-endian tokens) and NNNNNN.doc (JSON)
    shards/shard-00000.idx        offset, length and xxh3-64 of each member, as a .npy array
    shards/ids.npy                uint64 [documents, 2]: xxh3-64 of each document's id, ascending, and its first chunk

Documents, each [bos] tokens [eos], are concatenated and cut into chunks of `chunk_tokens` tokens; only the last chunk
of a corpus may be shorter. NNNNNN is the number of the chunk in the corpus. A `.doc` member describes the pieces of
documents in its chunk with these lists, one entry per piece:

    starts         offset of the piece's first token in the chunk
    source         index into the manifest's sources
    ids            id of the document
    offsets        offset of the piece's first token in its document: 0 unless the piece continues the document
    text_bytes     size of the document's text in UTF-8, given with its first piece, otherwise 0

Where the manifest has `loss_mask`, only some tokens count in the loss, and a `.doc` member has two more lists:

    targets        [start, stop, start, stop, ...]: the tokens that count, as ascending offsets in the chunk
    target_bytes   size of the text of the document's targets in UTF-8, given with its first piece, otherwise 0

Where the manifest has `packed`, documents are whole, each lies within one sequence of `packed.sequence_tokens` tokens,
and the last one of a sequence may be followed by filler (eos), which belongs to no document. One more list says where:

    ends           offset after the piece's last token
"""

from __future__ import annotations

import bisect
import errno
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pretrain.corpus.chunk_documents import (
    ChunkDocuments,
    continuation_problem,
    parse_documents,
    tokens_problem,
)
from pretrain.corpus.manifest import (
    DOCUMENTS,
    TOKENS,
    CorruptShardError,
    Manifest,
    load_manifest,
    member_name,
    open_member,
    read_index,
)
from pretrain.corpus.remote_chunks import RemoteChunks, load_remote_manifest
from pretrain.remote import ReadOptions, as_path, folder_of, redact, retry_local

SHARDS_FOLDER = "shards"
_OPEN_SHARDS = 64  # largest number of file descriptors that one Corpus holds
_CACHED_DOCUMENTS = 512  # largest number of parsed .doc members that one Corpus keeps
_BLOCK = tarfile.BLOCKSIZE


class Corpus:
    """Random access to the tokens of a corpus on a disk or at a URL.

    Shards and indexes are opened at first use. A Corpus can be pickled for another process and used after a fork. With
    `verify_chunks`, the hash of a chunk is checked at its first use in this process; chunks from a URL are always
    checked. A caller that has already read the manifest passes it as `manifest`. Raises ConfigError where the manifest
    is missing or invalid, ReadError where a store fails, and CorruptShardError where the manifest's root hash is not
    the given `root_sha256`.
    """

    def __init__(
        self,
        manifest_path: str | Path,
        verify_chunks: bool = True,
        root_sha256: str | None = None,
        options: ReadOptions | None = None,
        manifest: Manifest | None = None,
    ) -> None:
        self.manifest_path = as_path(manifest_path)
        self.verify_chunks = verify_chunks
        self.options = options or ReadOptions()
        if isinstance(self.manifest_path, str):
            self.manifest = load_remote_manifest(self.manifest_path, self.options, root_sha256, manifest)
        else:
            self.manifest = manifest or load_manifest(self.manifest_path)
        if root_sha256 not in (None, self.manifest.root_sha256):
            raise CorruptShardError(
                f"{redact(str(manifest_path))} is not the corpus that this run started with; put that corpus back"
            )
        self.n_chunks = self.manifest.n_chunks
        self.chunk_tokens = self.manifest.chunk_tokens
        self.last_chunk_tokens = self.manifest.last_chunk_tokens
        self._dtype = np.dtype(self.manifest.dtype)
        self._first_chunks = [shard.first_chunk for shard in self.manifest.shards]
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._documents: OrderedDict[int, ChunkDocuments] = OrderedDict()
        self._verified = np.zeros(self.n_chunks, dtype=bool)
        self._remote: RemoteChunks | None = None
        if isinstance(self.manifest_path, str):
            self._remote = self._new_remote()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle only the path and the options, so that the message to a worker process is small.

        If a worker is killed early, a message above the 64 KiB that a pipe holds would block its sender forever.
        """
        return Corpus, (self.manifest_path, self.verify_chunks, self.manifest.root_sha256, self.options)

    def _new_remote(self) -> RemoteChunks:
        return RemoteChunks(f"{folder_of(self.manifest_path)}/{SHARDS_FOLDER}", self.manifest, self.options)

    @property
    def is_behind_url(self) -> bool:
        """Whether the corpus is at a URL."""
        return self._remote is not None

    def prefetch(self, chunks: Sequence[int]) -> None:
        """Start to fetch chunks that will soon be read, in this order, at most `data.prefetch_chunks` at a time.

        Returns at once. Where fetching fails, `read` tries again and raises. For a corpus on a disk this does nothing.
        """
        if self._remote is not None:
            self._here(self._remote).prefetch(chunks)

    def _here(self, remote: RemoteChunks) -> RemoteChunks:
        """The reader of this process; a forked child makes a new one, since threads and connections do not survive."""
        if remote.pid != os.getpid():
            remote = self._remote = self._new_remote()
        return remote

    def tokens_in(self, chunk: int) -> int:
        """Number of tokens in a chunk."""
        return self.last_chunk_tokens if chunk == self.n_chunks - 1 else self.chunk_tokens

    def read(self, chunk: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a chunk as an array of the manifest's dtype; `stop` is clipped to the chunk's end.

        Raises CorruptShardError, IndexError for a chunk or start that does not exist, and, for a corpus at a URL,
        ReadError where the store fails for longer than `data.read_timeout_s`.
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

    def read_many(self, ranges: Sequence[tuple[int, int, int]]) -> list[np.ndarray]:
        """The results of `read` for several ranges, each given as (chunk, start, stop).

        From a disk, all ranges are read into one buffer with one system call each, several times faster than `read`.
        """
        if self._remote is not None or not ranges:
            return [self.read(*wanted) for wanted in ranges]
        width = self._dtype.itemsize
        chunks, starts, stops = np.array(ranges, np.int64).T
        stops = np.minimum(
            stops, np.where(chunks == self.n_chunks - 1, self.last_chunk_tokens, self.chunk_tokens)
        )
        borders = np.concatenate([[0], np.cumsum(stops - starts)])
        buffer = np.empty(int(borders[-1]), self._dtype.newbyteorder("<"))
        into, at = buffer.data.cast("B"), (borders * width).tolist()
        for i, (chunk, start) in enumerate(zip(chunks.tolist(), (starts * width).tolist(), strict=True)):
            shard, row = self._locate(chunk)
            target = into[at[i] : at[i + 1]]
            if self.verify_chunks and not self._verified[chunk]:
                target[:] = self._token_bytes(chunk, start, start + len(target))
            elif not shard.read_into(row, start, target):
                target[:] = shard.read(row, TOKENS, start, start + len(target))
        tokens = buffer.astype(self._dtype, copy=False)
        return [tokens[low:high] for low, high in pairwise(borders.tolist())]

    def documents(self, chunk: int) -> ChunkDocuments:
        """The document pieces of a chunk. Raises CorruptShardError, and IndexError for a chunk that does not exist."""
        if not 0 <= chunk < self.n_chunks:
            raise IndexError(f"{self.manifest_path}: no chunk {chunk}")
        if chunk in self._documents:
            self._documents.move_to_end(chunk)
            return self._documents[chunk]
        try:
            where, content = self._document_bytes(chunk)
            documents = parse_documents(
                content,
                where,
                n_tokens=self.tokens_in(chunk),
                n_sources=len(self.manifest.sources),
                masked=self.manifest.loss_mask,
                sequence_tokens=self.manifest.sequence_tokens,
            )
        except CorruptShardError as error:
            error.source_path, error.chunk = str(self.manifest_path), chunk
            raise
        self._documents[chunk] = documents
        if len(self._documents) > _CACHED_DOCUMENTS:
            self._documents.popitem(last=False)
        return documents

    def is_target(self, chunk: int, start: int, stop: int) -> np.ndarray:
        """Which of the tokens [start, stop) of a chunk count in the loss: bool [stop - start].

        Without a loss mask all are True. With one, positions after the chunk's end are False. Raises the errors of
        `documents`.
        """
        if not self.manifest.loss_mask:
            return np.ones(stop - start, np.bool_)
        targets = self.documents(chunk).targets
        assert targets is not None
        # A token is inside a target if an odd number of the ascending starts and stops are at or before it.
        return targets.searchsorted(np.arange(start, stop), side="right") % 2 == 1

    def _token_bytes(self, chunk: int, start: int, stop: int) -> bytes:
        if self.verify_chunks and not self._verified[chunk]:
            content = self._whole_tokens(chunk)
            problem = tokens_problem(content, self.manifest)
            if problem is not None:
                name = member_name(chunk, TOKENS)
                raise CorruptShardError(f"{redact(str(self.manifest_path))}: {name} {problem}")
            self._verified[chunk] = True
            return content[start:stop]
        if self._remote is not None:
            return self._here(self._remote).read(chunk, TOKENS, start, stop)
        shard, row = self._locate(chunk)
        return shard.read(row, TOKENS, start, stop)

    def _whole_tokens(self, chunk: int) -> bytes:
        """A whole .tok member with its hash checked."""
        if self._remote is not None:
            return self._here(self._remote).read(chunk, TOKENS, 0)
        shard, row = self._locate(chunk)
        return shard.member(row, TOKENS)

    def _document_bytes(self, chunk: int) -> tuple[str, bytes]:
        """The location of a .doc member, for errors, and its content."""
        if self._remote is not None:
            where = f"{redact(str(self.manifest_path))}: {member_name(chunk, DOCUMENTS)}"
            return where, self._here(self._remote).read(chunk, DOCUMENTS, 0)
        shard, row = self._locate(chunk)
        return f"{shard.path}: {member_name(chunk, DOCUMENTS)}", shard.member(row, DOCUMENTS)

    def _locate(self, chunk: int) -> tuple[_OpenShard, int]:
        number = bisect.bisect_right(self._first_chunks, chunk) - 1
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
    """One open shard with its index in memory. It reads with pread, so forked processes can share it.

    It is not memory-mapped, because with a mapping, a failing disk or network file system kills the process with a
    signal instead of raising an error.
    """

    def __init__(self, folder: Path, manifest: Manifest, number: int) -> None:
        self._descriptor = -1
        self.info = info = manifest.shards[number]
        self._folder, self.path = folder, folder / info.name
        self.index = read_index(folder, manifest, number)
        self.offsets = self.index[:, TOKENS, 0].tolist()
        try:
            self._descriptor = retry_local(self._open)
        except OSError as error:
            raise CorruptShardError(f"{self.path} cannot be opened: {error.strerror}") from error
        size = os.fstat(self._descriptor).st_size
        if size != info.bytes:
            raise CorruptShardError(self._size_problem(size))

    def _open(self) -> int:
        """Open the shard after checking that it is a regular file in its folder. Returns the descriptor."""
        with open_member(self._folder, self.info.name) as file:
            return os.dup(file.fileno())

    def _size_problem(self, size: int) -> str:
        ends = self.index[:, :, 0] + self.index[:, :, 1]  # uint64 [chunks, 2]
        lost = np.argwhere(ends > size)
        first = f"; the first member cut off is {self.member_name(*lost[0].tolist())}" if len(lost) else ""
        return f"{self.path} has {size} bytes, its manifest says {self.info.bytes}{first}"

    def member_name(self, row: int, kind: int) -> str:
        return member_name(self.info.first_chunk + row, kind)

    def read(self, row: int, kind: int, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a member, without checking their hash."""
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

    def read_into(self, row: int, start: int, target: memoryview) -> bool:
        """Fill `target` with the bytes of a .tok member from `start` on, without checking their hash.

        Returns whether it succeeded.
        """
        try:
            return os.preadv(self._descriptor, (target,), self.offsets[row] + start) == len(target)
        except OSError:
            return False

    def _read_anew(self, offset: int, size: int) -> bytes:
        """Open the file again and read from it, which helps if the handle is stale or a cache holds a partial file."""
        descriptor = self._open()
        try:
            content = os.pread(descriptor, size, offset)
            if len(content) != size:
                raise OSError(errno.EIO, f"it is cut off, {len(content)} of {size} bytes are there")
            os.dup2(descriptor, self._descriptor, inheritable=False)
        finally:
            os.close(descriptor)
        return content

    def member(self, row: int, kind: int) -> bytes:
        """A whole member with its hash checked."""
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
    """A whole document of a corpus."""

    source: str
    id: str
    tokens: np.ndarray
    text_bytes: int
    is_target: np.ndarray | None  # bool [tokens]: which tokens count in the loss; None: all of them
    target_bytes: int


def documents_of(corpus: Corpus) -> Iterator[StoredDocument]:
    """Every document in the order of the corpus, joined from its pieces. Raises the errors of `Corpus.read`."""
    parts: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    head: tuple[str, str] = ("", "")
    text_bytes = target_bytes = 0

    def document() -> StoredDocument:
        mask = np.concatenate(masks) if corpus.manifest.loss_mask else None
        return StoredDocument(*head, np.concatenate(parts), text_bytes, mask, target_bytes)

    before: ChunkDocuments | None = None
    for chunk in range(corpus.n_chunks):
        pieces, n_tokens = corpus.documents(chunk), corpus.tokens_in(chunk)
        problem = continuation_problem(before, corpus.chunk_tokens, pieces)
        if problem is not None:
            raise CorruptShardError(f"{corpus.manifest_path}: {member_name(chunk, DOCUMENTS)} {problem}")
        before = pieces
        tokens, are_targets = corpus.read(chunk, 0, n_tokens), corpus.is_target(chunk, 0, n_tokens)
        extents = zip(pieces.starts.tolist(), pieces.ends.tolist(), strict=True)
        for row, (document_id, (start, end)) in enumerate(zip(pieces.ids, extents, strict=True)):
            if pieces.offsets[row] == 0:
                if parts:
                    yield document()
                parts, masks = [], []
                head = (corpus.manifest.sources[pieces.source[row]].name, document_id)
                text_bytes = int(pieces.text_bytes[row])
                target_bytes = 0 if pieces.target_bytes is None else int(pieces.target_bytes[row])
            parts.append(tokens[start:end])
            masks.append(are_targets[start:end])
    yield document()
