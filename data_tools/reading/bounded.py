"""Decompresses untrusted files and splits them into lines, bounding each line before memory is allocated for it.

Raises only OSError and ValueError. `reader.py` turns lines into records.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import secrets
import sys
import zlib
from bz2 import BZ2Decompressor
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from data_tools.names import RECORD_BYTES
from data_tools.reading.encodings import UTF_8, decode
from pretrain.errors import ConfigError
from pretrain.stored import has_more_values

BOMB_FREE_BYTES = 16 << 20
"""Largest number of unpacked bytes for which any ratio is allowed, because a page of blanks is not an attack."""
BROKEN = (OSError, EOFError, zlib.error)
"""Errors raised by reading a file that is truncated or not an archive."""

PACKED_RATIO = 32
"""Largest number of unpacked bytes per packed byte of one block above BOMB_FREE_BYTES; text never packs so tightly."""
BLOCK_BYTES = 1 << 30
"""Largest number of unpacked bytes of one block, whatever its packed size."""

_BUFFER_BYTES = 1 << 20
# Above this number, a block with more values than bytes is not text.
_FREE_VALUES = 1 << 20
# Packed bytes per call: zstd can turn 1 KB into 32 MB, so this bounds what one call unpacks.
_ZST_BYTES = 1024
# The largest window that the zstd command accepts by default, which bounds the memory of decompression.
_ZST_WINDOW_BYTES = 128 << 20
_XZ_MEMORY_BYTES = 128 << 20  # the highest preset of xz needs 65 MiB
_MANY_VALUES = 500_000
_JSON = json.JSONDecoder()
# Lines that are parsed together: little more memory than the longest line takes.
_GROUP_LINES, _GROUP_BYTES = 256, 1 << 18
_MARK = secrets.token_hex(16)  # a string that no file can foresee
_BETWEEN = f',"{_MARK}",'.encode()
# Values are counted only in longer JSON: shorter JSON takes little memory, whatever it holds.
_COUNTED_LINE_BYTES = 1 << 20


class CutOffError(OSError):
    """A file ends too early, so that nobody knows how much of it is missing."""


class TooManyValuesError(ValueError):
    """A piece of JSON would take far more memory than it has bytes."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits on what reading one untrusted file may cost."""

    record_bytes: int = RECORD_BYTES
    """Decoded bytes of one record (a line, text, row, page or sample), and of rows that are decoded together."""
    ratio: int = 200
    """Unpacked bytes per packed byte, above BOMB_FREE_BYTES."""
    unpacked_bytes: int = 64 << 30
    """Unpacked bytes of one file."""


def check_unpacked(what: str, packed_bytes: int, unpacked_bytes: int) -> None:
    """Refuse a block that would take far more memory than it has bytes. Raises ValueError."""
    if unpacked_bytes > min(BLOCK_BYTES, max(BOMB_FREE_BYTES, PACKED_RATIO * packed_bytes)):
        raise ValueError(f"{what} of {packed_bytes:,} bytes unpacks to {unpacked_bytes:,}")


def check_values(what: str, packed_bytes: int, n_values: int) -> None:
    """Refuse a block with more values than bytes. Raises ValueError."""
    if n_values > max(_FREE_VALUES, packed_bytes):
        raise ValueError(f"{what} of {packed_bytes:,} bytes holds {n_values:,} values")


# ---- unpacking -------------------------------------------------------------------------------------------------------


def unpacked(raw: IO[bytes], suffix: str, bounds: Bounds) -> IO[bytes]:
    """Unpack a file whose name ends with `suffix`, piece by piece. A damaged file can be read up to the damage."""
    suffix = suffix.lower()
    if suffix.endswith(".zst"):
        return io.BufferedReader(_Unpacker(raw, _unzstd(raw), bounds), _BUFFER_BYTES)
    if suffix.endswith((".xz", ".bz2")):
        pieces = _unpacked_streams(raw, _xz if suffix.endswith(".xz") else BZ2Decompressor)
        return io.BufferedReader(_Unpacker(raw, pieces, bounds), _BUFFER_BYTES)
    is_gzip = suffix.endswith(".gz")
    if suffix.endswith(".warc"):  # often compressed despite its name
        is_gzip = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
    if is_gzip:
        file = gzip.GzipFile(fileobj=raw)
        pieces = iter(lambda: file.read1(_BUFFER_BYTES), b"")
        return io.BufferedReader(_Unpacker(raw, pieces, bounds), _BUFFER_BYTES)
    # Files of fsspec cannot read a line of limited length.
    return raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(_Borrowed(raw), _BUFFER_BYTES)


def head_of(file: Any, n_bytes: int) -> bytes:
    """The first bytes of an unpacked file, fewer where it is damaged there."""
    blocks: list[bytes] = []
    try:
        while n_bytes and (block := file.read1(n_bytes)):
            blocks.append(block)
            n_bytes -= len(block)
    except BROKEN:  # reading the records will come to this place again
        pass
    return b"".join(blocks)


class _Borrowed(io.RawIOBase):
    """A file that stays open when this object, or a buffer around it, is closed."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(buffer)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


class _Unpacker(io.RawIOBase):
    """Unpacked pieces as a file, within the bounds. Raises OSError beyond them."""

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
            except EOFError as error:  # callers would take it for the regular end of the file
                raise CutOffError(str(error)) from error
            except zlib.error as error:
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


def _xz() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES)


def _unpacked_streams(raw: IO[bytes], new: Callable[[], Any]) -> Iterator[bytes]:
    """Unpack the streams of a file of xz or bz2 one after another, in pieces of bounded size.

    The standard library's own file objects take bytes that follow the last stream for its end, and say nothing.
    """
    stream: Any = None
    packed = b""
    try:
        while True:
            if not packed and (stream is None or stream.needs_input):
                packed = raw.read(_BUFFER_BYTES)
                if not packed:
                    break
            if stream is None:
                if not (packed := packed.lstrip(b"\0")):  # xz pads its streams
                    continue
                stream = new()
            if piece := stream.decompress(packed, _BUFFER_BYTES):
                yield piece
            packed = b""
            if stream.eof:
                stream, packed = None, stream.unused_data
    except (lzma.LZMAError, MemoryError) as error:
        raise OSError(str(error)) from error
    if stream is not None:
        raise EOFError("the compressed file ends too early")


# ---- lines -----------------------------------------------------------------------------------------------------------


class Line:
    """One line that is not blank."""

    __slots__ = ("begin", "content", "end", "number")

    def __init__(self, number: int, begin: int, content: bytes | None, end: int) -> None:
        self.number = number
        """Number of the line in what is read, from 1."""
        self.begin, self.end = begin, end
        """Offsets in the unpacked file of the line's first byte and of the byte after its last."""
        self.content = content
        """The bytes of the line; None where it is longer than allowed."""

    def json(self, encoding: str = UTF_8) -> Any:
        """The JSON value of the line, whose bytes are released. Raises ValueError."""
        content = self._give_up()
        if encoding == UTF_8 and len(content) <= _COUNTED_LINE_BYTES:
            try:
                text = content.decode()
                value, end = _JSON.raw_decode(text)
                if text[end:] in ("\n", ""):
                    return value
            except (ValueError, RecursionError):
                pass  # below, at twice the cost: what is not as usual, and what is wrong
        else:
            text = ""
        self.content, content, text = content, b"", ""
        return parse_json(self._give_up(), encoding)

    def _give_up(self) -> bytes:
        assert self.content is not None
        content, self.content = self.content, b""
        return content


def parse_json(content: bytes, encoding: str = UTF_8) -> Any:
    """A JSON value of bounded cost. Raises ValueError, of which UnicodeDecodeError is one.

    Text that is not UTF-8 is in `encoding`. Where the caller keeps no reference to `content`, the bytes and their text
    are not in memory together.
    """
    if len(content) > _COUNTED_LINE_BYTES and has_more_values(content, _MANY_VALUES):
        raise TooManyValuesError(f"holds more than {_MANY_VALUES:,} values")
    text = decode(content, encoding)
    del content
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its brackets are nested too deep") from None


def lines(file: IO[bytes], max_bytes: int, start: int = 0, stop: int = sys.maxsize) -> Iterator[Line]:
    """The lines that begin in [start, stop) of a file. Blank lines are counted but not returned.

    Raises OSError where the rest of the file cannot be read.
    """
    at, number = start, 0
    try:
        if at:  # a line that reaches into this range belongs to the range before
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
    except EOFError as error:
        raise CutOffError(str(error)) from error
    except zlib.error as error:
        raise OSError(str(error)) from error


def line_groups(found: Iterable[Line]) -> Iterator[list[Line]]:
    """Lines in groups of bounded size. Where reading fails, the lines before come first."""
    group, n_bytes = list[Line](), 0
    try:
        for line in found:
            n_bytes += 0 if line.content is None else len(line.content)
            group.append(line)
            if n_bytes >= _GROUP_BYTES and len(group) > 1:  # a long line is parsed by itself
                yield group[:-1]
                group = group[-1:]
                n_bytes = len(line.content or b"")
            if n_bytes >= _GROUP_BYTES or len(group) == _GROUP_LINES:
                yield group
                group, n_bytes = [], 0
    except OSError:
        if group:
            yield group
        raise
    if group:
        yield group


def parsed_together(group: list[Line]) -> list[dict[str, Any]] | None:
    """The JSON objects of lines in UTF-8; None where a line holds anything else, and is to be parsed by itself.

    The lines become one array with a mark between them. Each is a value of its own if all marks are found at their
    places: a line that opens a bracket and does not close it would take marks into its own value.
    """
    contents = [line.content for line in group if line.content is not None]
    if len(group) == 1 or len(contents) < len(group):
        return None
    try:
        values = json.loads((b"[" + _BETWEEN.join(contents) + b"]").decode())
    except (ValueError, RecursionError):
        return None
    objects = values[::2]
    is_whole = len(objects) == len(group) and values[1::2] == [_MARK] * (len(group) - 1)
    return objects if is_whole and set(map(type, objects)) == {dict} else None


def _skip_line(file: IO[bytes], max_bytes: int) -> int:
    """Skip to the end of the line, at most `max_bytes`. Returns the number of bytes that were skipped."""
    skipped = 0
    while skipped < max_bytes:
        part = file.readline(min(_BUFFER_BYTES, max_bytes - skipped))
        skipped += len(part)
        if not part or part.endswith(b"\n"):
            break
    return skipped
