"""Writes a corpus in the format that `pretrain/corpus/shards.py` describes and reads."""

from __future__ import annotations

import hashlib
import io
import tarfile
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pretrain.corpus.chunk_documents import MAX_ID_CHARS
from pretrain.corpus.ids import IDS_NAME, hash_ids
from pretrain.corpus.manifest import (
    DOCUMENTS,
    MANIFEST_NAME,
    MAX_SHARD_CHUNKS,
    MAX_SHARDS,
    TOKENS,
    CorpusSource,
    Manifest,
    Packed,
    ShardInfo,
    describe_file,
    member_name,
    padded_bytes,
    token_dtype,
)
from pretrain.corpus.shards import SHARDS_FOLDER
from pretrain.errors import ConfigError
from pretrain.files import write_atomically, written_atomically

_BLOCK = tarfile.BLOCKSIZE
_PIECE_KEYS = ("starts", "source", "ids", "offsets", "text_bytes")


@dataclass(kw_only=True, slots=True)
class Documents:
    """Documents that are added to a corpus together."""

    tokens: np.ndarray
    """Tokens of all documents, each with its bos and eos, in the type that the corpus stores."""
    starts: np.ndarray
    """int64 [documents + 1]: where each document starts, then the end of the last one."""
    source: np.ndarray
    """int64 [documents]: index of each document's source."""
    ids: list[str]
    """Id of each document."""
    text_bytes: np.ndarray
    """int64 [documents]: size of each text in UTF-8."""
    targets: np.ndarray | None = None
    """With a loss mask, int64 [2 n]: [start, stop, start, stop, ...] in `tokens` of what counts in the loss."""
    target_bytes: np.ndarray | None = None
    """With a loss mask, int64 [documents]: size of the text of each document's targets in UTF-8."""


class CorpusWriter:
    """Writes a corpus. The same calls always write the same bytes.

    Every file is written under a temporary name, synced and renamed; `finish` writes the manifest last. `sources` are
    the sources that `add_document` may name, and `files` the names of other files in `folder` that belong to the
    corpus. With `loss_mask`, every document must say which of its tokens count in the loss. With `packed`, a document
    that does not fit into what is left of a sequence begins the next one, and eos fills up the one before; its length
    must divide `chunk_tokens`. With `classes`, the last token of a document is the number of its class. Raises
    ConfigError where `folder` already holds a corpus.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tokenizer_sha256: str,
        vocab_size: int,
        bos_id: int,
        eos_id: int,
        chunk_tokens: int,
        sources: Sequence[str | CorpusSource],
        shard_bytes: int = 1 << 30,
        files: Sequence[str] = (),
        loss_mask: bool = False,
        packed: Packed | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        self.folder = Path(folder)
        if (self.folder / MANIFEST_NAME).exists():
            raise ConfigError(f"{self.folder} already holds a corpus; choose another folder")
        (self.folder / SHARDS_FOLDER).mkdir(parents=True, exist_ok=True)
        self._sources = [
            CorpusSource(name=s) if isinstance(s, str) else CorpusSource(**asdict(s)) for s in sources
        ]
        self._source_index = {source.name: i for i, source in enumerate(self._sources)}
        self._header: dict[str, Any] = {
            "tokenizer_sha256": tokenizer_sha256,
            "vocab_size": vocab_size,
            "bos_id": bos_id,
            "eos_id": eos_id,
            "chunk_tokens": chunk_tokens,
            "loss_mask": loss_mask,
            "packed": packed,
            "classes": list(classes),
        }
        self._loss_mask = loss_mask
        self._sequence_tokens, self._eos_id = packed.sequence_tokens if packed else None, eos_id
        self._dtype = token_dtype(vocab_size)
        self._vocab_size, self._chunk_tokens = vocab_size, chunk_tokens
        self._shard_bytes, self._files = shard_bytes, list(files)
        self._shards: list[ShardInfo] = []
        self._shard: _ShardWriter | None = None
        self._n_chunks = 0
        self._id_rows = array("Q")  # hash of the id and first chunk of every document; 16 bytes per document
        self._buffer = np.empty(chunk_tokens, dtype=self._dtype.newbyteorder("<"))
        self._start_chunk()

    def _start_chunk(self) -> None:
        self._filled = 0
        self._columns: dict[str, list[Any]] = {key: [] for key in _PIECE_KEYS}  # one value per piece
        if self._loss_mask:
            self._columns |= {"targets": [], "target_bytes": []}
        if self._sequence_tokens is not None:
            self._columns["ends"] = []

    def add_document(
        self,
        tokens: Sequence[int] | np.ndarray,
        *,
        source: str,
        document_id: str,
        text_bytes: int = 0,
        targets: Sequence[int] | np.ndarray | None = None,
        target_bytes: int = 0,
    ) -> None:
        """Append one document. `tokens` include its bos and eos; `text_bytes` is the size of its text in UTF-8.

        With a loss mask, `targets` are the tokens that count in the loss, as [start, stop, start, stop, ...] in
        ascending order, and `target_bytes` is the size of their text in UTF-8. Raises ValueError for token ids outside
        the vocabulary (those of the stored type only when their chunk is written), for malformed targets, where
        targets are given without a loss mask or missing with one, and for a document longer than a packed sequence.
        """
        row = np.asarray(tokens)
        if row.ndim != 1 or not len(row):
            raise ValueError(f"document {document_id!r} is not a non-empty row of tokens")
        if len(document_id) > MAX_ID_CHARS:
            raise ValueError(
                f"document {document_id[:60]!r}... has an id of more than {MAX_ID_CHARS} characters"
            )
        # Tokens of the stored type are checked a chunk at a time, when it is written, which costs far less.
        if row.dtype != self._dtype and (
            np.minimum.reduce(row) < 0 or np.maximum.reduce(row) >= self._vocab_size
        ):
            raise self._unknown_token(document_id)
        if (targets is not None) is not self._loss_mask:
            raise ValueError(
                f"document {document_id!r} must have targets exactly if the corpus has a loss mask"
            )
        if targets is not None:
            spans = np.asarray(targets, np.int64)
            bounds = np.concatenate([[0], spans, [len(row)]])
            if len(spans) % 2 or (np.diff(bounds) < 0).any() or (spans[::2] == spans[1::2]).any():
                raise ValueError(
                    f"document {document_id!r} has targets that are not ascending starts and stops"
                )
        self.add_documents(
            Documents(
                tokens=row.astype(self._dtype),
                starts=np.array([0, len(row)]),
                source=np.array([self._source_index[source]]),
                ids=[document_id],
                text_bytes=np.array([text_bytes]),
                targets=None if targets is None else spans,
                target_bytes=None if targets is None else np.array([target_bytes]),
            )
        )

    def add_documents(self, documents: Documents) -> None:
        """Append documents, which is much faster than one by one. The caller checks what `add_document` checks."""
        if not len(documents.tokens):
            return
        counts = (np.ones_like(documents.source), np.diff(documents.starts), documents.text_bytes)
        sums = [np.bincount(documents.source, values, len(self._sources)) for values in counts]
        for number in np.flatnonzero(sums[0]).tolist():
            totals = self._sources[number]
            totals.documents += int(sums[0][number])
            totals.tokens += int(sums[1][number])
            totals.text_bytes += int(sums[2][number])
        ends = documents.starts[1:]
        if self._sequence_tokens is not None:
            documents, ends = self._packed(documents, self._sequence_tokens)
        done, n_tokens = 0, len(documents.tokens)
        while done < n_tokens:
            stop = min(done + self._chunk_tokens - self._filled, n_tokens)
            self._add_pieces(documents, ends, done, stop)
            self._buffer[self._filled : self._filled + stop - done] = documents.tokens[done:stop]
            self._filled += stop - done
            done = stop
            if self._filled == self._chunk_tokens:
                self._flush_chunk()

    def _packed(self, documents: Documents, length: int) -> tuple[Documents, np.ndarray]:
        """The documents with filler between them where one has to begin a sequence, and where each of them ends.

        The sequence that was begun by earlier documents is filled up if the first one does not fit into it.
        """
        sizes = np.diff(documents.starts)
        if int(sizes.max()) > length:
            name = documents.ids[int(sizes.argmax())]
            raise ValueError(f"document {name[:60]!r} is longer than the sequences of {length} tokens")
        room = -self._filled % length
        before = []  # filler in front of each document
        for size in sizes.tolist():
            before.append(room if size > room else 0)
            room = (length if size > room else room) - size
        if before[0]:
            self._fill_up()
            before[0] = 0
        shift = np.cumsum(before)
        starts = documents.starts[:-1] + shift
        tokens = np.full(len(documents.tokens) + int(shift[-1]), self._eos_id, documents.tokens.dtype)
        tokens[np.arange(len(documents.tokens)) + np.repeat(shift, sizes)] = documents.tokens
        targets = documents.targets
        if targets is not None and len(targets):
            of_document = np.searchsorted(documents.starts, targets[::2], side="right") - 1
            targets = targets + np.repeat(shift[of_document], 2)
        moved = replace(documents, tokens=tokens, starts=np.append(starts, len(tokens)), targets=targets)
        return moved, starts + sizes

    def _fill_up(self) -> None:
        """Fill the sequence that has been begun, if any, with eos, which belongs to no document."""
        if self._sequence_tokens is not None and (room := -self._filled % self._sequence_tokens):
            self._buffer[self._filled : self._filled + room] = self._eos_id
            self._filled += room
            if self._filled == self._chunk_tokens:
                self._flush_chunk()

    def _add_pieces(self, documents: Documents, ends: np.ndarray, start: int, stop: int) -> None:
        """Add the tokens [start, stop) of the documents to the lists of this chunk."""
        first = int(np.searchsorted(documents.starts, start, side="right")) - 1
        end = int(np.searchsorted(documents.starts, stop, side="left"))
        begins = documents.starts[first:end]
        offsets = np.maximum(start - begins, 0)
        is_begun = offsets == 0
        ids = documents.ids[first:end]
        hashes = hash_ids(ids[not is_begun[0] :])
        rows = np.column_stack([hashes, np.full(len(hashes), self._n_chunks, np.uint64)])
        self._id_rows.frombytes(rows.tobytes())
        added: dict[str, list[Any]] = {
            "starts": (begins + offsets - start + self._filled).tolist(),
            "source": documents.source[first:end].tolist(),
            "ids": ids,
            "offsets": offsets.tolist(),
            "text_bytes": (documents.text_bytes[first:end] * is_begun).tolist(),
        }
        if documents.targets is not None and documents.target_bytes is not None:
            added["targets"] = _spans_within(documents.targets, start, stop, self._filled)
            added["target_bytes"] = (documents.target_bytes[first:end] * is_begun).tolist()
        if self._sequence_tokens is not None:
            added["ends"] = (ends[first:end] - start + self._filled).tolist()
        for key, values in added.items():
            self._columns[key] += values

    def _unknown_token(self, document_id: str) -> ValueError:
        return ValueError(f"document {document_id!r} has token ids outside 0 to {self._vocab_size - 1}")

    def _flush_chunk(self) -> None:
        unknown = np.flatnonzero(self._buffer[: self._filled] >= self._vocab_size)
        if len(unknown):
            piece = int(np.searchsorted(self._columns["starts"], unknown[0], side="right")) - 1
            raise self._unknown_token(self._columns["ids"][piece])
        from pydantic_core import to_json  # imported here so that what only reads a corpus does not load it

        tokens = self._buffer[: self._filled].tobytes()
        columns = self._columns
        documents = to_json(columns)  # as json.dumps writes it, without blanks, and several times faster
        size = padded_bytes(len(tokens)) + padded_bytes(len(documents))
        shard = self._shard
        if shard and (shard.bytes + size > self._shard_bytes or shard.info.chunks == MAX_SHARD_CHUNKS):
            self._shards.append(shard.finish())
            self._shard = None
        if self._shard is None:
            if len(self._shards) == MAX_SHARDS:
                raise ConfigError(
                    f"the corpus {self.folder} would have more than {MAX_SHARDS:,} shards; raise shard_bytes above "
                    f"{self._shard_bytes:,}, or prepare several corpora and train on them as a mixture"
                )
            name = f"shard-{len(self._shards):05d}.tar"
            self._shard = _ShardWriter(self.folder / SHARDS_FOLDER, name, self._n_chunks)
        self._shard.add(tokens, documents, self._filled, columns["offsets"].count(0))
        self._n_chunks += 1
        self._start_chunk()

    def finish(self) -> Manifest:
        """Write the last chunk, the index of ids and the manifest. Raises ValueError where no document was added."""
        self._fill_up()
        if self._filled:
            self._flush_chunk()
        if self._shard is None:
            raise ValueError(f"no document was added to the corpus {self.folder}")
        self._shards.append(self._shard.finish())
        self._shard = None
        self._write_ids()
        manifest = Manifest(
            **self._header,
            dtype=self._dtype.name,
            n_chunks=self._n_chunks,
            n_tokens=sum(shard.tokens for shard in self._shards),
            n_documents=sum(shard.documents for shard in self._shards),
            sources=self._sources,
            shards=self._shards,
            files=[describe_file(self.folder, name) for name in [*self._files, IDS_NAME]],
        )
        manifest.root_sha256 = manifest.compute_root_sha256()
        write_atomically(self.folder / MANIFEST_NAME, manifest.to_json().encode())
        return manifest

    def _write_ids(self) -> None:
        rows = np.frombuffer(self._id_rows, np.uint64).reshape(-1, 2)
        content = io.BytesIO()
        np.save(content, rows[np.argsort(rows[:, 0], kind="stable")].astype("<u8"), allow_pickle=False)
        write_atomically(self.folder / IDS_NAME, content.getvalue())


def _spans_within(spans: np.ndarray, start: int, stop: int, offset: int) -> list[int]:
    """The parts of `spans` within tokens [start, stop) of a document, as offsets in the chunk.

    Token `start` of the document is at `offset` in the chunk.
    """
    pairs = np.clip(spans.reshape(-1, 2), start, stop)
    pairs = pairs[pairs[:, 0] < pairs[:, 1]]
    return (pairs - start + offset).flatten().tolist()


# mtime, uid and gid are 0, owner names empty: TarInfo's defaults.
_EMPTY_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)


def _header(name: str, size: int) -> bytes:
    """The header of a file in a tar, as TarInfo.tobuf gives it in ten times the time."""
    head = name.encode("ascii").ljust(100, b"\0") + _EMPTY_HEADER[100:124] + b"%011o\0" % size
    rest = _EMPTY_HEADER[156:]
    before_sum = head + _EMPTY_HEADER[136:148]
    return before_sum + b"%06o\0 " % sum(before_sum + b" " * 8 + rest) + rest


class _ShardWriter:
    """One tar shard, written under a temporary name and hashed while it is written."""

    def __init__(self, folder: Path, name: str, first_chunk: int) -> None:
        self.folder = folder
        self.info = ShardInfo(name=name, first_chunk=first_chunk)
        self._open = ExitStack()
        self._file = self._open.enter_context(written_atomically(folder / name, durable=True))
        self._sha256 = hashlib.sha256()
        self._rows: list[list[tuple[int, int, int]]] = []
        self.bytes = 0

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._sha256.update(content)
        self.bytes += len(content)

    def _member(self, kind: int, content: bytes) -> tuple[int, int, int]:
        self._write(_header(member_name(self.info.first_chunk + len(self._rows), kind), len(content)))
        offset = self.bytes
        self._write(content + bytes(-len(content) % _BLOCK))
        return offset, len(content), xxhash.xxh3_64_intdigest(content)

    def add(self, tokens: bytes, documents: bytes, n_tokens: int, n_documents: int) -> None:
        self._rows.append([self._member(TOKENS, tokens), self._member(DOCUMENTS, documents)])
        self.info.chunks += 1
        self.info.tokens += n_tokens
        self.info.documents += n_documents

    def finish(self) -> ShardInfo:
        self._write(bytes(2 * _BLOCK))
        index = io.BytesIO()
        np.save(index, np.array(self._rows, dtype="<u8"), allow_pickle=False)
        write_atomically(self.folder / self.info.index_name, index.getvalue())
        self._open.close()  # the shard gets its final name only after its index has one
        self.info.bytes, self.info.sha256 = self.bytes, self._sha256.hexdigest()
        self.info.index_sha256 = hashlib.sha256(index.getvalue()).hexdigest()
        return self.info
