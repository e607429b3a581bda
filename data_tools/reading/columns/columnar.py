"""Reads rows of untrusted Parquet and Arrow files, whose size is bounded before they are decoded.

pyarrow allocates what a file asks for, and a few hundred bytes can ask for terabytes: through dictionaries with
repeated values, compressed pages and buffers, or false counts. So this module first reads the headers that pyarrow
will rely on: those of every page of a Parquet column, and of every message of an Arrow stream. Sizes in the metadata
of a file are not trusted. Raises only OSError and ValueError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

from data_tools.reading.bounded import BOMB_FREE_BYTES, PACKED_RATIO, Bounds, check_unpacked, check_values
from data_tools.reading.columns.arrow_messages import Messages
from data_tools.reading.columns.parquet_pages import (
    DELTA_BYTE_ARRAY,
    DELTA_LENGTH_BYTE_ARRAY,
    Page,
    delta_bytes,
    read_footer,
    read_pages,
)

_BUFFER_BYTES = 1 << 20
_THRIFT_STRING_BYTES = 16 << 20
_THRIFT_ITEMS = 100_000
_DELTAS = {DELTA_LENGTH_BYTE_ARRAY, DELTA_BYTE_ARRAY}


class Row(NamedTuple):
    """One row of a table."""

    fields: dict[str, Any] | None
    """Values by column; None for a bad row."""
    problem: str = ""
    """The problem of a bad row."""


@contextmanager
def _arrow_errors() -> Iterator[None]:
    """Turn whatever pyarrow raises on a broken file into a ValueError with one line of text."""
    import pyarrow

    try:
        yield
    except (OSError, ValueError):  # ArrowInvalid is a ValueError
        raise
    except (pyarrow.ArrowException, MemoryError, IndexError, KeyError, TypeError, OverflowError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(reason) from error


def is_text(kind: Any) -> bool:
    """Whether a column of this type holds text."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_name(kind: Any) -> bool:
    """Whether a column of this type can hold ids: text or integers."""
    from pyarrow import types

    return is_text(kind) or types.is_integer(kind.value_type if types.is_dictionary(kind) else kind)


class Header(NamedTuple):
    """The schema of a CSV file, whose columns all hold text."""

    names: list[str]


def name_columns(schema: Any, names: Sequence[str]) -> list[str]:
    """Those of the names that are columns of text or integers. `schema` is an Arrow schema or a `Header`."""
    return [
        name
        for name in dict.fromkeys(names)
        if name in schema.names and (isinstance(schema, Header) or _is_name(kind_of(schema, name)))
    ]


def text_problem(schema: Any, name: str) -> str | None:
    """The reason why a table has no text in the column of this name, or None if it has."""
    if name not in schema.names:
        return f"has no column {name!r} (it has {', '.join(schema.names[:8])})"
    if isinstance(schema, Header) or is_text(kind := kind_of(schema, name)):
        return None
    return f"holds {kind} in the column {name!r}, no text"


def kind_of(schema: Any, name: str) -> Any:
    """The type of an existing column. Where a file has several of that name, the first one counts."""
    return schema.field(schema.names.index(name)).type


def _decoded_bytes(array: Any) -> int:
    """Approximate memory of an array once its values are decoded, without sharing between equal values."""
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
    """The rows of batches; `packed_bytes` yields, for each batch, the number of bytes read from the file so far."""
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
        self.groups = read_footer(raw)
        n_groups = self._file.metadata.num_row_groups
        if len(self.groups) != n_groups or any(
            len(group.chunks) != len(self._leaves) for group in self.groups
        ):
            raise ValueError("its metadata is broken")

    def _opened(self, raw: IO[bytes], dictionaries: list[str] | None = None) -> Any:
        from pyarrow import parquet

        return parquet.ParquetFile(
            raw,
            buffer_size=_BUFFER_BYTES,
            read_dictionary=dictionaries,
            thrift_string_size_limit=_THRIFT_STRING_BYTES,
            thrift_container_size_limit=_THRIFT_ITEMS,
        )

    def rows(self, group: int, columns: list[str], most_rows: int, bounds: Bounds) -> Iterator[Row]:
        """The rows of a row group, at most `most_rows` decoded at a time. Raises OSError and ValueError."""
        leaves = [i for i, path in enumerate(self._leaves) if any(_is_below(path, name) for name in columns)]
        with _arrow_errors():
            pages = {leaf: self._pages(group, leaf) for leaf in leaves}
            packed_bytes = sum(page.packed_bytes for leaf in pages.values() for page in leaf)
            unpacked_bytes = sum(page.unpacked_bytes for leaf in pages.values() for page in leaf)
            # One row may hold a very long list, so its texts stay dictionary indices until they have been counted.
            nested = [i for i in leaves if self._file.schema.column(i).max_repetition_level]
            ratio = min(bounds.ratio, PACKED_RATIO) if nested else bounds.ratio
            if unpacked_bytes > max(BOMB_FREE_BYTES, ratio * packed_bytes):
                raise ValueError(f"unpacks to more than {ratio} times its size")
            check_values("it", packed_bytes, sum(page.n_values for leaf in pages.values() for page in leaf))
            file = self._opened(self._raw, self._numbered(nested, pages)) if nested else self._file
            n = _batch_rows(list(pages.values()), most_rows, bounds)
            batches = file.iter_batches(n, [group], columns, use_threads=False)
            yield from _rows(batches, iter(lambda: packed_bytes, None), bounds)

    def _pages(self, group: int, leaf: int) -> list[Page]:
        """The headers of a column's pages, at the places where pyarrow will look for them."""
        chunk = self.groups[group].chunks[leaf]
        pages = list(read_pages(self._raw, chunk))
        column = self._file.schema.column(leaf)
        n_levels = (column.max_definition_level > 0) + (column.max_repetition_level > 0)
        for number, page in enumerate(pages):
            if _DELTAS & {*page.encodings}:
                decoded_bytes = delta_bytes(self._raw, page, chunk.codec, n_levels)
                pages[number] = page._replace(unpacked_bytes=max(page.unpacked_bytes, decoded_bytes))
        return pages

    def _numbered(self, leaves: list[int], pages: dict[int, list[Page]]) -> list[str]:
        """The paths of the leaves whose texts can stay indices into a dictionary.

        Raises ValueError where the texts of another leaf could take far more memory than it has bytes.
        """
        numbered = []
        for leaf in leaves:
            column = self._file.schema.column(leaf)
            is_fixed = column.physical_type == "FIXED_LEN_BYTE_ARRAY"
            if not is_fixed and not any(_DELTAS & {*page.encodings} for page in pages[leaf]):
                numbered.append(column.path)
                continue
            dictionary_bytes = max(
                (page.unpacked_bytes for page in pages[leaf] if page.is_dictionary), default=0
            )
            value_bytes = column.length if is_fixed else dictionary_bytes
            n_values = sum(page.n_values for page in pages[leaf])
            check_unpacked(
                f"column {column.path}",
                sum(page.packed_bytes for page in pages[leaf]),
                n_values * value_bytes,
            )
        return numbered


def _is_below(path: str, name: str) -> bool:
    """Whether the path of a leaf is a column, or a part of it."""
    return path == name or path.startswith(f"{name}.")


def _batch_rows(leaves: list[list[Page]], most_rows: int, bounds: Bounds) -> int:
    """Number of rows that fit the bound together even if each value is the largest that its pages can hold."""
    row_bytes = 0
    for pages in leaves:
        # The values of all other pages are stored one by one, so their rows take no more than the pages' bytes.
        repeated = (page.unpacked_bytes for page in pages if page.is_dictionary or page.n_values < most_rows)
        row_bytes += max(repeated, default=0)
    return max(1, min(most_rows, bounds.record_bytes // max(1, row_bytes)))


# ---- Arrow -----------------------------------------------------------------------------------------------------------


class ArrowStream:
    """An open Arrow file in the stream format, as Hugging Face saves datasets. Raises OSError and ValueError."""

    def __init__(self, raw: IO[bytes], bounds: Bounds) -> None:
        from pyarrow import ipc

        self._bounds = bounds
        self._raw = raw
        with _arrow_errors():
            self.schema = ipc.open_stream(Messages(raw)).schema

    def rows(self, columns: list[str]) -> Iterator[Row]:
        """All rows. Raises OSError and ValueError."""
        from pyarrow import ipc

        self._raw.seek(0)
        messages = Messages(self._raw)
        wanted = ipc.IpcReadOptions(included_fields=sorted(self.schema.names.index(name) for name in columns))
        with _arrow_errors():
            reader = ipc.open_stream(messages, options=wanted)
            batches = (_validated(batch) for batch in reader)
            yield from _rows(batches, iter(lambda: messages.read_bytes, None), self._bounds)


def _validated(batch: Any) -> Any:
    """A batch, after a check that its offsets and indices stay within its memory. Raises ValueError."""
    import pyarrow

    for column in batch.columns:
        # Text that is not UTF-8 is harmless here, and is reported row by row.
        if pyarrow.types.is_string(column.type):
            column = column.view(pyarrow.binary())
        elif pyarrow.types.is_large_string(column.type):
            column = column.view(pyarrow.large_binary())
        column.validate(full=True)
    return batch
