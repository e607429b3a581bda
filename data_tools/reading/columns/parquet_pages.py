"""Reads the headers of a Parquet file's columns and pages, which decide how much memory pyarrow takes for each.

pyarrow reports part of them, but it ends the process if the metadata of a column is broken, so it is not used here.
The headers are in Thrift's compact protocol. Raises only OSError and ValueError.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from data_tools.reading.bounded import check_unpacked, check_values


class Page(NamedTuple):
    """The header of a page."""

    kind: int
    """Type of the page, as in parquet.thrift."""
    at: int
    """Offset of the page in the file, after its header."""
    packed_bytes: int
    """Size of the page in the file, in bytes."""
    unpacked_bytes: int
    """Size of the unpacked page in bytes."""
    n_values: int
    """Number of values."""
    encodings: tuple[int, ...]
    """Encodings of the values and the levels, as in parquet.thrift."""
    levels_bytes: int
    """Bytes before the values of a data page of version 2, which are never packed."""
    is_packed: bool
    """Whether the values are compressed."""

    @property
    def is_dictionary(self) -> bool:
        return self.kind == _DICTIONARY_PAGE


_DICTIONARY_PAGE, _DATA_PAGE_V2 = 2, 3
DELTA_LENGTH_BYTE_ARRAY, DELTA_BYTE_ARRAY = 6, 7
# Extra bytes that pyarrow allows, because chunks of old writers are longer than they state.
_PADDING_BYTES = 100
_PAGE_HEADER_BYTES = 1 << 20
_FIRST_HEADER_BYTES = 1 << 10
_KIND, _UNPACKED, _PACKED, _DATA, _DICTIONARY, _DATA_V2 = 1, 2, 3, 5, 7, 8
_N_VALUES = 1
_ENCODING = {_DATA: 2, _DICTIONARY: 2, _DATA_V2: 4}
_LEVELS_OF_V2, _IS_PACKED_OF_V2 = (5, 6), 7
# Largest number of values in a miniblock. Writers use 32.
_PART_VALUES = 4096
_CODECS = {1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}


class Chunk(NamedTuple):
    """A column of a row group."""

    start: int
    """Offset of its first page in the file."""
    n_bytes: int
    """Size of its pages in the file, in bytes."""
    n_values: int
    """Number of values that the metadata states."""
    codec: int
    """Compression, as in parquet.thrift."""


class Group(NamedTuple):
    """A row group, as the metadata of the file states it."""

    n_rows: int
    """Number of rows."""
    n_bytes: int
    """Size of the row group in bytes."""
    chunks: list[Chunk]
    """Its columns."""


def read_footer(raw: IO[bytes]) -> list[Group]:
    """The row groups of a file. Raises ValueError where it is not a Parquet file."""
    size_bytes = raw.seek(0, os.SEEK_END)
    if size_bytes < 12:
        raise ValueError(f"it has {size_bytes} bytes, and is no Parquet file")
    raw.seek(size_bytes - 8)
    [length] = struct.unpack("<I", raw.read(8)[:4])
    if length > size_bytes - 12:
        raise ValueError("it is cut off, or no Parquet file")
    raw.seek(size_bytes - 8 - length)
    try:
        fields, _ = read_thrift(raw.read(length))
    except EOFError:
        raise ValueError("its metadata is broken") from None
    return [_group_of(group) for group in _structs(fields, 4)]


def _structs(fields: dict[int, Any], key: int) -> list[dict[int, Any]]:
    found = fields.get(key)
    return found if isinstance(found, list) else []


def _group_of(fields: dict[int, Any]) -> Group:
    chunks = []
    for column in _structs(fields, 1):
        inner = column.get(3)
        inner = inner if isinstance(inner, dict) else {}
        codec, n_values, n_bytes, start = (_number(inner, key) for key in (4, 5, 7, 9))
        if 0 < (dictionary := _number(inner, 11) if 11 in inner else 0) < start:
            start = dictionary
        chunks.append(Chunk(start, n_bytes, n_values, codec))
    return Group(_number(fields, 3), _number(fields, 2), chunks)


def _number(fields: dict[int, Any], key: int) -> int:
    value = fields.get(key)
    if not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ValueError("its metadata is broken")
    return value


def read_pages(raw: IO[bytes], chunk: Chunk) -> Iterator[Page]:
    """The headers of the pages of a column in a row group.

    Raises ValueError where a header is false, or asks for too much memory.
    """
    size_bytes = raw.seek(0, os.SEEK_END)
    start, chunk_bytes, n_values, _ = chunk
    if not 0 <= start <= size_bytes or not 0 <= chunk_bytes <= size_bytes - start:
        raise ValueError(
            f"a column begins at {start:,} and has {chunk_bytes:,} bytes, of {size_bytes:,} in the file"
        )
    at, end, seen = start, start + chunk_bytes, 0
    while at < min(end + _PADDING_BYTES, size_bytes) and seen < n_values:
        try:
            header, header_bytes = _page_header(raw, at)
            page = _page_of(header, at + header_bytes)
        except ValueError:
            if at >= end:
                return
            raise
        at += header_bytes + page.packed_bytes
        if at > size_bytes:
            raise ValueError(f"a page of {page.packed_bytes:,} bytes reaches beyond the end of the file")
        check_unpacked("a page", page.packed_bytes, page.unpacked_bytes)
        check_values("a page", page.packed_bytes, page.n_values)
        seen += 0 if page.is_dictionary else page.n_values
        yield page


def _page_header(raw: IO[bytes], at: int) -> tuple[dict[int, Any], int]:
    """The fields of the header at this offset, and its size."""
    wanted = _FIRST_HEADER_BYTES
    while True:
        raw.seek(at)
        data = raw.read(wanted)
        try:
            return read_thrift(data)
        except EOFError:
            if len(data) < wanted or wanted >= _PAGE_HEADER_BYTES:
                raise ValueError("the file ends within the header of a page") from None
            wanted = min(_PAGE_HEADER_BYTES, 16 * wanted)


def _page_of(header: dict[int, Any], at: int) -> Page:
    inner = {key: fields for key in _ENCODING if isinstance(fields := header.get(key), dict)}
    sizes = [header.get(_PACKED), header.get(_UNPACKED)]
    counts = [fields.get(_N_VALUES) for fields in inner.values()]
    levels = [inner.get(_DATA_V2, {}).get(key, 0) for key in _LEVELS_OF_V2]
    if not all(isinstance(number, int) and 0 <= number < 1 << 31 for number in (*sizes, *counts, *levels)):
        raise ValueError("the header of a page is broken")
    return Page(
        kind=header.get(_KIND, -1),
        at=at,
        packed_bytes=sizes[0],
        unpacked_bytes=sizes[1],
        n_values=max(counts, default=0),
        encodings=tuple(fields.get(_ENCODING[key], -1) for key, fields in inner.items()),
        levels_bytes=sum(levels),
        is_packed=inner.get(_DATA_V2, {}).get(_IS_PACKED_OF_V2, True),
    )


# ---- lengths that are packed as differences --------------------------------------------------------------------------


def delta_bytes(raw: IO[bytes], page: Page, codec: int, n_levels: int) -> int:
    """Decoded bytes of a page whose texts have delta-encoded lengths and prefixes.

    100 bytes can hold half a billion lengths, or repeat a long text many times. `n_levels` is the number of kinds of
    levels before the values. Raises ValueError, also where there are more lengths than values.
    """
    raw.seek(page.at)
    data = raw.read(page.packed_bytes)
    try:
        if page.kind == _DATA_PAGE_V2:
            values = data[page.levels_bytes :]
            if page.is_packed:
                values = _unpacked(values, page.unpacked_bytes - page.levels_bytes, codec)
            at = 0
        else:
            values, at = _unpacked(data, page.unpacked_bytes, codec), 0
            for _ in range(n_levels):
                at += 4 + struct.unpack_from("<I", values, at)[0]
        at, total = _lengths(values, at, page.n_values)
        if DELTA_BYTE_ARRAY in page.encodings:
            # The first lengths are those of prefixes shared with the previous text; these are those of the rest.
            at, rest = _lengths(values, at, page.n_values)
            total += rest
        return total
    except (struct.error, IndexError, EOFError) as error:
        raise ValueError("the lengths in a page are broken") from error


def _unpacked(data: bytes, unpacked_bytes: int, codec: int) -> bytes:
    import pyarrow

    if codec == 0:
        return data
    if codec not in _CODECS:
        raise ValueError(f"a page is packed by the codec {codec}, which cannot be checked")
    return pyarrow.Codec(_CODECS[codec]).decompress(data, unpacked_bytes, asbytes=True)


def _lengths(data: bytes, at: int, n_values: int) -> tuple[int, int]:
    """The end of a list of lengths (DELTA_BINARY_PACKED), and their sum.

    Raises ValueError where there are more lengths than values, or a negative one.
    """
    reader = _Thrift(data, at)  # Parquet writes these numbers in the same way as Thrift
    block_values, n_parts, count = reader.varint(), reader.varint(), reader.varint()
    total = value = reader.number()
    if not 0 < n_parts <= block_values or count > n_values:
        raise ValueError(f"a page of {n_values:,} values has lengths for {count:,}")
    left, part_values = count - 1, block_values // n_parts
    if part_values > _PART_VALUES:
        raise ValueError(f"a page has its lengths in blocks of {part_values:,}")
    while left > 0:
        least = reader.number()
        widths = data[reader.at : reader.at + n_parts]
        reader.skip(n_parts)
        for width in widths:
            if left <= 0:
                break
            if width > 64:
                raise ValueError("the lengths in a page are broken")
            begin = reader.at
            reader.skip(part_values * width // 8)
            packed = int.from_bytes(data[begin : reader.at], "little")
            for i in range(min(left, part_values)):
                value += least + (packed >> i * width & (1 << width) - 1)
                if value < 0:
                    raise ValueError("a length in a page is negative")
                total += value
            left -= part_values
    return reader.at, total


# ---- Thrift ----------------------------------------------------------------------------------------------------------

_DEPTH = 16


def read_thrift(data: bytes) -> tuple[dict[int, Any], int]:
    """A struct in Thrift's compact protocol, as values by field number, and its size.

    Only numbers, flags, structs and lists of structs are returned. Raises EOFError where the data ends within it, and
    ValueError where it is broken.
    """
    reader = _Thrift(data)
    fields = reader.struct(0)
    return fields, reader.at


class _Thrift:
    def __init__(self, data: bytes, at: int = 0) -> None:
        self._data, self.at = data, at

    def struct(self, depth: int) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        field = 0
        while head := self._byte():
            field = field + (head >> 4) if head >> 4 else self.number()
            value = self._value(head & 15, depth + 1)
            if value is not None:
                fields[field] = value
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        """An integer, a flag, a struct or a list of structs; None for anything else, which is skipped."""
        if depth > _DEPTH:
            raise ValueError("a header is nested too deep")
        match kind:
            case 1 | 2:  # true and false, which the type itself states
                return kind == 1
            case 3:
                return self._byte()
            case 4 | 5 | 6:
                return self.number()
            case 7:
                self.skip(8)
            case 8:
                self.skip(self.varint())
            case 9 | 10:
                head = self._byte()
                count = self.varint() if head >> 4 == 15 else head >> 4
                if head & 15 == 12:
                    return [self.struct(depth + 1) for _ in range(count)]
                for _ in range(count):
                    self._item(head & 15, depth + 1)
            case 12:
                return self.struct(depth)
            case _:
                raise ValueError("a header is broken")
        return None

    def _item(self, kind: int, depth: int) -> None:
        if kind in (1, 2):  # inside a list, they take one byte each
            self.skip(1)
        else:
            self._value(kind, depth)

    def _byte(self) -> int:
        self.skip(1)
        return self._data[self.at - 1]

    def skip(self, n_bytes: int) -> None:
        self.at += n_bytes
        if self.at > len(self._data):
            raise EOFError

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a header is broken")

    def number(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)
