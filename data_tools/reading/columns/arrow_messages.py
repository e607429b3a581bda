"""Checks the messages of an Arrow stream before pyarrow allocates the memory that their headers ask for.

Raises only OSError and ValueError.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from data_tools.reading.bounded import BLOCK_BYTES, check_unpacked, check_values

_CONTINUATION = b"\xff" * 4
_METADATA_BYTES = 16 << 20
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3


@dataclass(slots=True)
class _Body:
    """The description of a message's body in its header."""

    kind: int = 0
    """Type of the message, as in Arrow's Message.fbs."""
    n_bytes: int = 0
    """Size of the body."""
    n_rows: int = 0
    """Number of rows of a batch."""
    is_packed: bool = False
    """Whether the buffers are compressed."""
    buffers: Sequence[tuple[int, int]] = ()
    """Offset and size of each buffer in the body."""


class Messages(io.RawIOBase):
    """An Arrow stream that passes a message on only after its header has been checked."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._size_bytes = raw.seek(0, os.SEEK_END)
        raw.seek(0)
        self._left: list[bytes] = []
        self.read_bytes = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """Read like a file, but at most one part of a message per call, which is how pyarrow reads."""
        if not self._left:
            self._left = self._message()
        part = self._left.pop(0)
        if 0 <= size < len(part):
            self._left.insert(0, part[size:])
            return part[:size]
        return part

    def _exactly(self, n_bytes: int, what: str) -> bytes:
        if not 0 <= n_bytes <= self._size_bytes - self._raw.tell():
            raise ValueError(f"{what} of {n_bytes:,} bytes reaches beyond the end of the file")
        return self._raw.read(n_bytes)

    def _message(self) -> list[bytes]:
        head = self._raw.read(4)
        if head == _CONTINUATION:
            head += self._raw.read(4)
        if len(head) < 4 or head[-4:] == bytes(4):
            return [head]
        [length] = struct.unpack("<i", head[-4:])
        if length > _METADATA_BYTES:
            raise ValueError("it is no Arrow stream, or the header of a message has more than 16 MiB")
        metadata = self._exactly(length, "the header of a message")
        body = read_message(metadata)
        if body.n_bytes > BLOCK_BYTES:
            raise ValueError(f"a message has {body.n_bytes:,} bytes")
        content = self._exactly(body.n_bytes, "a message")
        check_message(body, content)
        self.read_bytes = self._raw.tell()
        return [part for part in (head, metadata, content) if part]


def check_message(body: _Body, content: bytes) -> None:
    """Refuse a message that would take far more memory than it has bytes. Raises ValueError."""
    if body.kind not in (_DICTIONARY_BATCH, _RECORD_BATCH):
        return
    check_values("a message", len(content), body.n_rows)
    if body.is_packed:
        unpacked_bytes = 0
        for offset, size in body.buffers:
            if size and 0 <= offset <= len(content) - 8:
                [claimed] = struct.unpack_from("<q", content, offset)
                unpacked_bytes += max(claimed, 0) if claimed != -1 else size
        check_unpacked("a message", len(content), unpacked_bytes)


def read_message(metadata: bytes) -> _Body:
    """Parse the header of an Arrow message, a flatbuffer. Raises ValueError where it is broken."""
    try:
        message = _Table(metadata, struct.unpack_from("<I", metadata)[0])
        body = _Body(kind=message.number(1, "<B"), n_bytes=message.number(3, "<q"))
        table = message.table(2)
        if body.kind == _DICTIONARY_BATCH and table is not None:
            table = table.table(1)
        if body.kind in (_DICTIONARY_BATCH, _RECORD_BATCH) and table is not None:
            body.n_rows = table.number(0, "<q")
            body.is_packed = table.table(3) is not None
            body.buffers = table.pairs(2)
        return body
    except (struct.error, IndexError) as error:
        raise ValueError("the header of a message is broken") from error


class _Table:
    """A table of a flatbuffer. Raises struct.error or IndexError where it points outside of the data."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at
        self._fields = at - struct.unpack_from("<i", data, at)[0]
        if self._fields < 0:
            raise IndexError
        [self._size] = struct.unpack_from("<H", data, self._fields)

    def _place(self, field: int) -> int | None:
        entry = 4 + 2 * field
        if entry + 2 > self._size:
            return None
        [offset] = struct.unpack_from("<H", self._data, self._fields + entry)
        return self._at + offset if offset else None

    def number(self, field: int, kind: str) -> int:
        place = self._place(field)
        return 0 if place is None else int(struct.unpack_from(kind, self._data, place)[0])

    def _reference(self, field: int) -> int | None:
        place = self._place(field)
        return None if place is None else place + int(struct.unpack_from("<I", self._data, place)[0])

    def table(self, field: int) -> _Table | None:
        place = self._reference(field)
        return None if place is None else _Table(self._data, place)

    def pairs(self, field: int) -> list[tuple[int, int]]:
        place = self._reference(field)
        if place is None:
            return []
        [count] = struct.unpack_from("<I", self._data, place)
        content = self._data[place + 4 : place + 4 + 16 * count]
        if len(content) < 16 * count:
            raise IndexError
        return list(struct.iter_unpack("<qq", content))
