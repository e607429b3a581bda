"""Decompression and lines of untrusted files: each line is bounded in size before memory is taken for it.

Raises only OSError and ValueError. `reader.py` turns lines into records.
"""

from __future__ import annotations

import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from data_tools.names import RECORD_BYTES
from pretrain.errors import ConfigError
from pretrain.stored import has_more_values

BOMB_FREE_BYTES = 16 << 20
"""Small files may be of any ratio: a page of blanks is no attack."""
BROKEN = (OSError, EOFError, zlib.error)
"""What reading a file that ends too early, or is no archive, raises."""

PACKED_RATIO = 32
"""Unpacked bytes per packed byte of one block beyond BOMB_FREE_BYTES: text is never packed as tightly."""
BLOCK_BYTES = 1 << 30
"""Unpacked bytes of one block, however many it has packed."""

_BUFFER_BYTES = 1 << 20
# More values than bytes are no text.
_FREE_VALUES = 1 << 20
# zstd can make 32 MB of 1 KB: what is unpacked at once stays bounded.
_ZST_BYTES = 1024
# The largest window that the zstd command takes unasked.
_ZST_WINDOW_BYTES = 128 << 20
_MANY_VALUES = 500_000
# Shorter lines cost little, whatever they hold.
_COUNTED_LINE_BYTES = 1 << 20


class TooManyValuesError(ValueError):
    """A line of JSON would take much more memory than it has bytes."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one file of a stranger may cost."""

    record_bytes: int = RECORD_BYTES
    """Decoded bytes of one record (a line, a text, a row, a page), and of rows that are decoded together."""
    ratio: int = 200
    """Unpacked bytes per packed byte, beyond BOMB_FREE_BYTES."""
    unpacked_bytes: int = 64 << 30
    """Unpacked bytes of one file."""


def check_unpacked(what: str, packed_bytes: int, unpacked_bytes: int) -> None:
    """Refuse what takes much more memory than it has bytes. Raises ValueError."""
    if unpacked_bytes > min(BLOCK_BYTES, max(BOMB_FREE_BYTES, PACKED_RATIO * packed_bytes)):
        raise ValueError(f"{what} of {packed_bytes:,} bytes unpacks to {unpacked_bytes:,}")


def check_values(what: str, packed_bytes: int, n_values: int) -> None:
    """Refuse more values than bytes. Raises ValueError."""
    if n_values > max(_FREE_VALUES, packed_bytes):
        raise ValueError(f"{what} of {packed_bytes:,} bytes holds {n_values:,} values")


# ---- unpacking -------------------------------------------------------------------------------------------------------


def unpacked(raw: IO[bytes], suffix: str, bounds: Bounds) -> IO[bytes]:
    """The bytes of a file whose name ends with `suffix`, a piece at a time: what comes before a break is not lost."""
    suffix = suffix.lower()
    if suffix.endswith(".zst"):
        return io.BufferedReader(_Unpacker(raw, _unzstd(raw), bounds), _BUFFER_BYTES)
    is_gzip = suffix.endswith(".gz")
    if suffix.endswith(".warc"):  # compressed ones are common under this name
        is_gzip = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
    if is_gzip:
        file = gzip.GzipFile(fileobj=raw)
        pieces = iter(lambda: file.read1(_BUFFER_BYTES), b"")
        return io.BufferedReader(_Unpacker(raw, pieces, bounds), _BUFFER_BYTES)
    # Files of fsspec cannot read a line of limited length.
    return raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw, _BUFFER_BYTES)  # type: ignore[type-var]


class _Unpacker(io.RawIOBase):
    """Pieces of bytes as a file, with bounds on how much they may be. Raises OSError beyond them."""

    def __init__(self, packed: IO[bytes], pieces: Iterator[bytes], bounds: Bounds) -> None:
        self._packed, self._pieces, self._bounds = packed, pieces, bounds
        self._left = memoryview(b"")
        self._size_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            try:
                self._left = memoryview(next(self._pieces, b""))
            except (
                EOFError,
                zlib.error,
            ) as error:  # readers of archives take the first for the end of a whole file
                raise OSError(str(error)) from error
            self._size_bytes += len(self._left)
            ratio, most = self._bounds.ratio, self._bounds.unpacked_bytes
            if self._size_bytes > most:
                raise OSError(f"unpacks to more than {most} bytes")
            if self._size_bytes > max(BOMB_FREE_BYTES, ratio * self._packed.tell()):
                raise OSError(f"unpacks to more than {ratio} times its size")
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size


def _unzstd(raw: IO[bytes]) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError("a .zst file needs zstandard: pip install 'pretrain[data]'") from error
    frame = None
    try:
        while packed := raw.read(_ZST_BYTES):
            while packed:
                if frame is None:
                    frame = zstandard.ZstdDecompressor(max_window_size=_ZST_WINDOW_BYTES).decompressobj()
                if piece := frame.decompress(packed):
                    yield piece
                packed = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except (zstandard.ZstdError, MemoryError) as error:
        raise OSError(str(error)) from error
    if frame is not None:
        raise EOFError("the compressed file ends too early")


# ---- lines -----------------------------------------------------------------------------------------------------------


class Line:
    """One line that is not blank."""

    __slots__ = ("begin", "content", "end", "number")

    def __init__(self, number: int, begin: int, content: bytes | None, end: int) -> None:
        self.number = number
        """From 1."""
        self.begin, self.end = begin, end
        """Places in the unpacked bytes."""
        self.content = content
        """None where the line is longer than allowed."""

    def json(self) -> Any:
        """The value that the line holds. Its bytes are given up for it. Raises ValueError."""
        return parse_json(self._give_up())

    def _give_up(self) -> bytes:
        assert self.content is not None
        content, self.content = self.content, b""
        return content


def parse_json(content: bytes) -> Any:
    """A JSON value of bounded cost. Raises ValueError, of which UnicodeDecodeError is one.

    Where the caller keeps no reference to `content`, the bytes and their text are not in memory together.
    """
    if len(content) > _COUNTED_LINE_BYTES and has_more_values(content, _MANY_VALUES):
        raise TooManyValuesError(f"holds more than {_MANY_VALUES:,} values")
    text = content.decode("utf-8-sig")
    del content
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its brackets are nested too deep") from None


def lines(file: IO[bytes], max_bytes: int, start: int = 0, stop: int = sys.maxsize) -> Iterator[Line]:
    """Lines that begin in a stretch of a file; blank ones are passed over, though they count.

    Raises OSError where the file cannot be read on.
    """
    at, number = start, 0
    try:
        if at:  # the line that reaches into the stretch belongs to the one before
            file.seek(at - 1)
            at += _skip_line(file, stop - at + 1) - 1
        while at < stop and (content := file.readline(max_bytes + 1)):
            number += 1
            line = Line(number, at, content, at + len(content))
            at = line.end
            if len(content) > max_bytes and not content.endswith(b"\n"):
                content = line.content = None
                yield line
                at += _skip_line(file, stop - at)
            elif not content.isspace():
                content = None
                yield line
    except (EOFError, zlib.error) as error:
        raise OSError(str(error)) from error


def _skip_line(file: IO[bytes], max_bytes: int) -> int:
    """Bytes to the end of the line, or `max_bytes` of them."""
    skipped = 0
    while skipped < max_bytes:
        part = file.readline(min(_BUFFER_BYTES, max_bytes - skipped))
        skipped += len(part)
        if not part or part.endswith(b"\n"):
            break
    return skipped
