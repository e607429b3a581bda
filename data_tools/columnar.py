"""Rows of Parquet and Arrow files that strangers made, bounded in size before they are decoded.

pyarrow takes the memory that a file asks for, and a few hundred bytes can ask for terabytes: by dictionaries whose
values are repeated, by compressed pages and buffers, by counts that nothing stands behind. So the headers that it will
go by are read first, here: those of every page of a Parquet column, and those of every message of an Arrow stream.
What the metadata of a file claims about sizes is not believed. Raises OSError and ValueError alone.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

from data_tools.bounded import BOMB_FREE_BYTES, Bounds

_BUFFER_BYTES = 1 << 20
# Honest pages and buffers beyond BOMB_FREE_BYTES stay below both: text is never packed as tightly.
_PAGE_RATIO = 32
_PAGE_BYTES = 1 << 30
# More values than bytes are no text.
_FREE_VALUES = 1 << 20
_THRIFT_STRING_BYTES = 16 << 20
_THRIFT_ITEMS = 100_000


class Row(NamedTuple):
    """One row, from the first of what was asked for."""

    fields: dict[str, Any] | None
    problem: str = ""
    """What is wrong with it, where it has no fields."""


@contextmanager
def _arrow_errors() -> Iterator[None]:
    """Whatever pyarrow raises on a broken file, as a ValueError of one line."""
    import pyarrow

    try:
        yield
    except (OSError, ValueError):  # ArrowInvalid is a ValueError
        raise
    except (pyarrow.ArrowException, MemoryError, IndexError, KeyError, TypeError, OverflowError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(reason) from error


def _check_unpacked(what: str, packed_bytes: int, unpacked_bytes: int) -> None:
    """Refuse what takes much more memory than it has bytes. Raises ValueError."""
    if unpacked_bytes > min(_PAGE_BYTES, max(BOMB_FREE_BYTES, _PAGE_RATIO * packed_bytes)):
        raise ValueError(f"{what} of {packed_bytes:,} bytes unpacks to {unpacked_bytes:,}")


def _check_values(what: str, packed_bytes: int, n_values: int) -> None:
    """Refuse more values than bytes. Raises ValueError."""
    if n_values > max(_FREE_VALUES, packed_bytes):
        raise ValueError(f"{what} of {packed_bytes:,} bytes holds {n_values:,} values")


def is_text(kind: Any) -> bool:
    """Whether a column of this type holds text."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_name(kind: Any) -> bool:
    """Whether a column of this type holds what can be an id: text or whole numbers."""
    from pyarrow import types

    return is_text(kind) or types.is_integer(kind.value_type if types.is_dictionary(kind) else kind)


def name_columns(schema: Any, names: Sequence[str]) -> list[str]:
    """Those of the names that are columns of text or whole numbers."""
    return [
        name for name in dict.fromkeys(names) if name in schema.names and _is_name(schema.field(name).type)
    ]


def _decoded_bytes(array: Any) -> int:
    """About the memory that the values of an array take once each is a value of its own."""
    import pyarrow
    from pyarrow import compute

    kind = array.type
    if pyarrow.types.is_dictionary(kind):
        if not is_text(kind):
            return 8 * len(array)
        lengths = compute.binary_length(array.dictionary)
        return compute.sum(lengths.take(array.indices)).as_py() or 0
    if is_text(kind):
        return compute.sum(compute.binary_length(array)).as_py() or 0
    if pyarrow.types.is_struct(kind):
        return 8 * len(array) + sum(map(_decoded_bytes, array.flatten()))
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        return 8 * len(array) + _decoded_bytes(array.flatten())
    return 8 * len(array) + array.nbytes


def _rows(batches: Iterator[Any], packed_bytes: Iterator[int], bounds: Bounds) -> Iterator[Row]:
    """Rows of batches; `packed_bytes` gives, for each of them, how much of the file has been read."""
    decoded_bytes = 0
    for batch, packed in zip(batches, packed_bytes, strict=False):
        size = sum(map(_decoded_bytes, batch.columns))
        decoded_bytes += size + len(batch)
        if decoded_bytes > max(BOMB_FREE_BYTES, bounds.ratio * packed):
            raise ValueError(f"unpacks to more than {bounds.ratio} times its size")
        yield from _rows_of(batch, bounds) if size > bounds.record_bytes else _rows_at_once(batch, bounds)


def _rows_at_once(batch: Any, bounds: Bounds) -> Iterator[Row]:
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        yield from _rows_of(batch, bounds)
    else:
        yield from map(Row, rows)


def _rows_of(batch: Any, bounds: Bounds) -> Iterator[Row]:
    for i in range(len(batch)):
        row = batch.slice(i, 1)
        if sum(map(_decoded_bytes, row.columns)) > bounds.record_bytes:
            yield Row(None, f"is a row of more than {bounds.record_bytes} bytes")
            continue
        try:
            [fields] = row.to_pylist()
        except UnicodeDecodeError:
            yield Row(None, "is not UTF-8")
        else:
            yield Row(fields)


# ---- Parquet ---------------------------------------------------------------------------------------------------------


class ParquetFile:
    """An open Parquet file."""

    def __init__(self, raw: IO[bytes]) -> None:
        with _arrow_errors():
            self._file = self._opened(raw)
            self.schema = self._file.schema_arrow
            self._leaves = [self._file.schema.column(i).path for i in range(self._file.metadata.num_columns)]
        self._raw = raw
        self.n_groups: int = self._file.metadata.num_row_groups

    def _opened(self, raw: IO[bytes], dictionaries: list[str] | None = None) -> Any:
        from pyarrow import parquet

        return parquet.ParquetFile(
            raw,
            buffer_size=_BUFFER_BYTES,
            read_dictionary=dictionaries,
            thrift_string_size_limit=_THRIFT_STRING_BYTES,
            thrift_container_size_limit=_THRIFT_ITEMS,
        )

    @property
    def n_rows(self) -> int:
        """As the file claims."""
        return int(self._file.metadata.num_rows)

    def group_rows(self, group: int) -> int:
        """Rows of a row group, as the file claims."""
        return int(self._file.metadata.row_group(group).num_rows)

    def group_bytes(self, group: int) -> int:
        """Size of a row group, as the file claims."""
        return int(self._file.metadata.row_group(group).total_byte_size)

    def rows(self, group: int, columns: list[str], most_rows: int, bounds: Bounds) -> Iterator[Row]:
        """The rows of a row group, decoded `most_rows` or fewer at a time. Raises OSError and ValueError."""
        leaves = [i for i, path in enumerate(self._leaves) if any(_is_below(path, name) for name in columns)]
        with _arrow_errors():
            pages = [self._pages(group, leaf) for leaf in leaves]
            packed_bytes = sum(page.packed_bytes for leaf in pages for page in leaf)
            unpacked_bytes = sum(page.unpacked_bytes for leaf in pages for page in leaf)
            # A row may hold very many values of a list; each is a number in the dictionary until it is a text.
            nested = [self._leaves[i] for i in leaves if self._file.schema.column(i).max_repetition_level]
            ratio = min(bounds.ratio, _PAGE_RATIO) if nested else bounds.ratio
            if unpacked_bytes > max(BOMB_FREE_BYTES, ratio * packed_bytes):
                raise ValueError(f"unpacks to more than {ratio} times its size")
            _check_values("it", packed_bytes, sum(page.n_values for leaf in pages for page in leaf))
            file = self._opened(self._raw, nested) if nested else self._file
            n = _batch_rows(pages, most_rows, bounds)
            batches = file.iter_batches(n, [group], columns, use_threads=False)
            yield from _rows(batches, iter(lambda: packed_bytes, None), bounds)

    def _pages(self, group: int, leaf: int) -> list[_Page]:
        """The headers of a column's pages, where pyarrow will find them."""
        chunk = self._file.metadata.row_group(group).column(leaf)
        start = chunk.data_page_offset
        if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < start:
            start = chunk.dictionary_page_offset
        pages = list(read_pages(self._raw, start, chunk.total_compressed_size, chunk.num_values))
        column = self._file.schema.column(leaf)
        if column.max_repetition_level:  # these are not kept as numbers in the dictionary
            is_fixed = column.physical_type == "FIXED_LEN_BYTE_ARRAY"
            for page in pages:
                if is_fixed or page.encoding == _DELTA_BYTE_ARRAY:
                    value_bytes = column.length if is_fixed else page.unpacked_bytes
                    _check_unpacked("a page", page.packed_bytes, page.n_values * value_bytes)
        return pages


def _is_below(path: str, name: str) -> bool:
    """Whether a leaf's path is that of a column, or of a part of it."""
    return path == name or path.startswith(f"{name}.")


class _Page(NamedTuple):
    """What the header of a page says."""

    is_dictionary: bool
    packed_bytes: int
    unpacked_bytes: int
    n_values: int
    encoding: int


_DICTIONARY_PAGE = 2
_DELTA_BYTE_ARRAY = 7
# What pyarrow allows for files of old writers, whose chunks are longer than they say.
_PADDING_BYTES = 100
_PAGE_HEADER_BYTES = 16 << 20
_FIRST_HEADER_BYTES = 1 << 10
_TYPE, _UNPACKED, _PACKED, _DATA, _DICTIONARY, _DATA_V2 = 1, 2, 3, 5, 7, 8
_N_VALUES = 1
_ENCODING = {_DATA: 2, _DICTIONARY: 2, _DATA_V2: 4}


def read_pages(raw: IO[bytes], start: int, chunk_bytes: int, n_values: int) -> Iterator[_Page]:
    """The headers of the pages of a column chunk, whose pages hold `n_values` together.

    Raises ValueError where one does not hold what it says, or asks for too much.
    """
    size_bytes = raw.seek(0, os.SEEK_END)
    if not 0 <= start <= size_bytes or not 0 <= chunk_bytes <= size_bytes - start:
        raise ValueError(
            f"a column begins at {start:,} and has {chunk_bytes:,} bytes, of {size_bytes:,} in the file"
        )
    at, end, seen = start, start + chunk_bytes, 0
    while at < min(end + _PADDING_BYTES, size_bytes) and seen < n_values:
        try:
            header, header_bytes = _page_header(raw, at)
            page = _page_of(header)
        except ValueError:
            if at >= end:
                return
            raise
        at += header_bytes + page.packed_bytes
        if at > size_bytes:
            raise ValueError(f"a page of {page.packed_bytes:,} bytes reaches beyond the end of the file")
        _check_unpacked("a page", page.packed_bytes, page.unpacked_bytes)
        seen += 0 if page.is_dictionary else page.n_values
        yield page


def _page_header(raw: IO[bytes], at: int) -> tuple[dict[int, Any], int]:
    """The fields of the header that begins here, and its size."""
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


def _page_of(header: dict[int, Any]) -> _Page:
    kinds = [(key, inner) for key in _ENCODING if isinstance(inner := header.get(key), dict)]
    sizes = [header.get(_PACKED), header.get(_UNPACKED)]
    counts = [inner.get(_N_VALUES) for _, inner in kinds]
    numbers = [*sizes, *counts]
    if not all(isinstance(number, int) and 0 <= number < 1 << 31 for number in numbers):
        raise ValueError("the header of a page is broken")
    encodings = [inner.get(_ENCODING[key]) for key, inner in kinds]
    return _Page(
        header.get(_TYPE) == _DICTIONARY_PAGE,
        sizes[0],
        sizes[1],
        max(counts, default=0),
        _DELTA_BYTE_ARRAY if _DELTA_BYTE_ARRAY in encodings else 0,
    )


def _batch_rows(leaves: list[list[_Page]], most_rows: int, bounds: Bounds) -> int:
    """Rows that can be decoded together: even where every value is the largest that its pages can hold."""
    row_bytes = 0
    for pages in leaves:
        # The values of other pages are all there: rows of many pages take no more than these have bytes.
        repeated = (
            page.unpacked_bytes
            for page in pages
            if page.is_dictionary or page.encoding == _DELTA_BYTE_ARRAY or page.n_values < most_rows
        )
        row_bytes += max(repeated, default=0)
    return max(1, min(most_rows, bounds.record_bytes // max(1, row_bytes)))


_THRIFT_DEPTH = 8
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)


def read_thrift(data: bytes) -> tuple[dict[int, Any], int]:
    """The whole numbers and structs of a struct in Thrift's compact protocol, by field, and its size.

    Raises EOFError where the data ends within it, and ValueError where it is none.
    """
    reader = _Thrift(data)
    fields = reader.struct(0)
    return fields, reader.at


class _Thrift:
    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def struct(self, depth: int) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        field = 0
        while head := self._byte():
            field = field + (head >> 4) if head >> 4 else self._number()
            value = self._value(head & 15, depth + 1)
            if value is not None:
                fields[field] = value
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        """A whole number or a struct; None for anything else, which is passed over."""
        if depth > _THRIFT_DEPTH:
            raise ValueError("a header is nested too deep")
        match kind:
            case 1 | 2:  # true and false, which are told by the kind
                return None
            case 3:
                return self._byte()
            case 4 | 5 | 6:
                return self._number()
            case 7:
                self._skip(8)
            case 8:
                self._skip(self._varint())
            case 9 | 10:
                head = self._byte()
                count = self._varint() if head >> 4 == 15 else head >> 4
                for _ in range(count):
                    self._item(head & 15, depth + 1)
            case 12:
                return self.struct(depth)
            case _:
                raise ValueError("a header is broken")
        return None

    def _item(self, kind: int, depth: int) -> None:
        if kind in (1, 2):  # within a list, they have a byte each
            self._skip(1)
        else:
            self._value(kind, depth)

    def _byte(self) -> int:
        self._skip(1)
        return self._data[self.at - 1]

    def _skip(self, n_bytes: int) -> None:
        self.at += n_bytes
        if self.at > len(self._data):
            raise EOFError

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a header is broken")

    def _number(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)


# ---- Arrow -----------------------------------------------------------------------------------------------------------


def arrow_stream(raw: IO[bytes], bounds: Bounds) -> ArrowStream:
    """An open Arrow file of the stream format, as Hugging Face datasets are saved. Raises OSError and ValueError."""
    return ArrowStream(raw, bounds)


class ArrowStream:
    """An open Arrow file of the stream format."""

    def __init__(self, raw: IO[bytes], bounds: Bounds) -> None:
        from pyarrow import ipc

        self._bounds = bounds
        self._raw = raw
        with _arrow_errors():
            self.schema = ipc.open_stream(_Messages(raw)).schema

    def rows(self, columns: list[str]) -> Iterator[Row]:
        """All rows. Raises OSError and ValueError."""
        from pyarrow import ipc

        self._raw.seek(0)
        messages = _Messages(self._raw)
        wanted = ipc.IpcReadOptions(included_fields=sorted(self.schema.names.index(name) for name in columns))
        with _arrow_errors():
            reader = ipc.open_stream(messages, options=wanted)
            batches = (_validated(batch) for batch in reader)
            yield from _rows(batches, iter(lambda: messages.read_bytes, None), self._bounds)


def _validated(batch: Any) -> Any:
    """A batch whose numbers lead nowhere outside of its memory. Raises ValueError."""
    import pyarrow

    for column in batch.columns:
        # Text that is no UTF-8 is no danger, and told row by row.
        if pyarrow.types.is_string(column.type):
            column = column.view(pyarrow.binary())
        elif pyarrow.types.is_large_string(column.type):
            column = column.view(pyarrow.large_binary())
        column.validate(full=True)
    return batch


_CONTINUATION = b"\xff" * 4
_METADATA_BYTES = 16 << 20
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3


@dataclass(slots=True)
class _Body:
    """What a message says of the bytes behind it."""

    kind: int = 0
    n_bytes: int = 0
    n_rows: int = 0
    is_packed: bool = False
    buffers: Sequence[tuple[int, int]] = ()
    """Place and size of each."""


class _Messages(io.RawIOBase):
    """An Arrow stream of which a message is let through once its header has been looked at."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._size_bytes = raw.seek(0, os.SEEK_END)
        raw.seek(0)
        self._left: list[bytes] = []
        self.read_bytes = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """As of a file; at most one of the parts of a message, which is how pyarrow asks for them."""
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
        if body.n_bytes > _PAGE_BYTES:
            raise ValueError(f"a message has {body.n_bytes:,} bytes")
        content = self._exactly(body.n_bytes, "a message")
        check_message(body, content)
        self.read_bytes = self._raw.tell()
        return [part for part in (head, metadata, content) if part]


def check_message(body: _Body, content: bytes) -> None:
    """Refuse a message that would take much more memory than it has bytes. Raises ValueError."""
    if body.kind not in (_DICTIONARY_BATCH, _RECORD_BATCH):
        return
    _check_values("a message", len(content), body.n_rows)
    if body.is_packed:
        unpacked_bytes = 0
        for offset, size in body.buffers:
            if size and 0 <= offset <= len(content) - 8:
                [claimed] = struct.unpack_from("<q", content, offset)
                unpacked_bytes += max(claimed, 0) if claimed != -1 else size
        _check_unpacked("a message", len(content), unpacked_bytes)


def read_message(metadata: bytes) -> _Body:
    """What the header of an Arrow message says, a flatbuffer. Raises ValueError where it is none."""
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
    """A table of a flatbuffer. Raises struct.error where it leads out of the data."""

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
