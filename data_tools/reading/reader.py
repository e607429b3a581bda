"""The one reader of text: the records of a file of any format.

`units.py` adapts these records for a curation, and `sources.py` for a preparation. The two differ only in ids, sources
and the description of a bad record. Files are untrusted, so each record is bounded in size before memory is allocated
for it.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import IO, Any, NamedTuple

from data_tools.reading.bounded import (
    BROKEN,
    Bounds,
    CutOffError,
    Line,
    head_of,
    line_groups,
    lines,
    parsed_together,
    unpacked,
)
from data_tools.reading.columns.columnar import ArrowStream, Header, ParquetFile, Row
from data_tools.reading.encodings import HEAD_BYTES, UTF_8, advice, decode, encoding_of, is_wide, recoded
from data_tools.reading.listing import is_url, reason_of
from data_tools.reading.spanning import JsonForm, csv_rows, json_form, json_values
from data_tools.reading.tars import samples
from data_tools.reading.web.warc import pages
from pretrain.errors import ConfigError
from pretrain.files import open_regular, read_at_most
from pretrain.remote import file_system

_ROWS = 64  # largest number of rows that are decoded at a time


def open_file(path: str) -> IO[bytes]:
    """Open a regular file of this machine, or a URL."""
    if not is_url(path):
        return open_regular(path)
    fs, at = file_system(path)
    return fs.open(at, "rb")


def require(module: str, path: str) -> Any:
    """Import a module that a format needs. Raises ConfigError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{path} needs {module}: pip install 'pretrain[data]'") from error


# ---- records ---------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One record of a file, or what is wrong with it."""

    place: int
    """Offset in bytes of a line in the unpacked file; for other records, the number in the file, counted from 0."""
    number: int
    """The number of the record in the file, counted from 1."""
    position_bytes: int
    """How much of the file has been read."""
    fields: dict[str, Any] = {}  # noqa: RUF012 - read only
    """The fields of a record; empty for a format that has none."""
    text: str | None = None
    """The text, if the format stores it outside of the fields."""
    url: str | None = None
    """The address of a web page."""
    problem: str = ""
    """What is wrong with the record; empty for a good record."""
    is_too_large: bool = False
    """Whether the problem is the record's size."""
    is_break: bool = False
    """Whether the problem is in the file, so that at least part of it cannot be read."""
    is_file: bool = False
    """Whether the entry stands for the whole file, which its place need not tell."""
    lost: int = 1
    """The number of documents that the problem takes away, as far as that is known."""
    lost_bytes: int = 0
    """Where it is not known: the number of bytes of the file that hold these documents."""


class Run(NamedTuple):
    """Good records that follow one another in a file of JSON lines. Together they cost half as much as one by one."""

    lines: list[Line]
    """The line of each record."""
    position_bytes: int
    """How much of the file has been read."""
    fields: list[dict[str, Any]]
    """The fields of each record."""

    def entries(self) -> Iterator[Entry]:
        """The records one by one."""
        for line, fields in zip(self.lines, self.fields, strict=True):
            yield Entry(line.begin, line.number, self.position_bytes, fields)


@dataclass(frozen=True, slots=True)
class Span:
    """What to read of a file, and how."""

    path: str
    """A path on this machine, or a URL."""
    format: str
    """The format, a value of FORMATS."""
    bounds: Bounds
    """Limits on the memory and size of what is read."""
    choose_columns: Callable[[Any], list[str]]
    """Chooses the columns of a table by its Arrow schema, or by the header of CSV. Raises NoTextError."""
    start: int = 0
    """Where the span begins: a byte offset in plain JSONL, or a row group of Parquet.

    A line belongs to the span in which it begins.
    """
    stop: int | None = None
    """Where the span ends, in the same unit; None means the end of the file."""
    encoding: str = UTF_8
    """The encoding of text that has no byte-order mark and is not UTF-8."""
    encoding_key: str = "encoding"
    """The option that sets it."""


class NoTextError(ValueError):
    """A table has no column of text. The message continues a sentence that begins with the name of the file."""


@dataclass(slots=True)
class _Place:
    """The place up to which a file has been read."""

    place: int
    """The place of the next record."""
    number: int
    """The number of the next record; 0 until the file is open."""
    records: int = 0
    """Number of records before it."""

    def set(self, place: int, number: int) -> None:
        self.place, self.number = place, number


def entries(raw: IO[bytes], span: Span) -> Iterator[Entry]:
    """The records of a file, a few in memory at a time. The last one may say why the rest cannot be read.

    Raises ConfigError where a package is missing.
    """
    for found in runs(raw, span):
        if isinstance(found, Run):
            yield from found.entries()
        else:
            yield found


def runs(raw: IO[bytes], span: Span) -> Iterator[Entry | Run]:
    """As `entries`, but good records that cost less together come together."""
    readers: dict[str, Callable[[IO[bytes], Span, _Place], Iterator[Entry | Run]]] = {
        "jsonl": _jsonl,
        "json": _json,
        "csv": _csv,
        "parquet": _parquet,
        "arrow": _arrow,
        "text": _text,
        "warc": _warc,
        "tar": _tar,
    }
    at = _Place(0, 0)
    found = readers[span.format](raw, span, at)
    while True:
        try:
            entry = next(found, None)
        except ConfigError:
            raise
        except (*BROKEN, ValueError) as error:
            yield _broken(raw, span, at, error)
            return
        if entry is None:
            break
        at.records += len(entry.fields) if isinstance(entry, Run) else 1
        yield entry
    if not at.records and span.start == 0 and span.stop is None:
        problem = "holds no record"
        yield Entry(0, 0, _size(raw), problem=problem, is_break=True, is_file=True, lost=0)


def _broken(raw: IO[bytes], span: Span, at: _Place, error: BaseException) -> Entry:
    """The entry for the part of a file that cannot be read, with an estimate of what it holds."""
    if isinstance(error, NoTextError):
        problem = str(error)
    else:
        problem = f"cannot be read{' from here on' if at.number else ''}: {reason_of(error)}"
    entry = Entry(at.place, at.number, raw.tell(), problem=problem, is_break=True, is_file=not at.number)
    if span.format == "text":
        return entry
    begin = span.start if span.format == "jsonl" else 0
    read_bytes = raw.tell() - begin
    all_bytes = _size(raw) - begin
    if not at.records or not read_bytes:
        return entry._replace(lost_bytes=max(1, all_bytes))
    # A file that was cut off at a random place has lost, in the median, as much as is left of it.
    is_cut = isinstance(error, (EOFError, CutOffError))
    lost_bytes = read_bytes if is_cut else all_bytes - read_bytes
    return entry._replace(lost=max(1, round(at.records * lost_bytes / read_bytes)))


def _size(raw: IO[bytes]) -> int:
    return raw.seek(0, os.SEEK_END)


def _opened(raw: IO[bytes], span: Span) -> tuple[IO[bytes], str]:
    """The unpacked file, and the encoding of those of its lines that are not UTF-8. UTF-16 and UTF-32 are recoded."""
    if span.start:  # such a file is read from its beginning
        return unpacked(raw, span.path, span.bounds), span.encoding
    encoding = encoding_of(head_of(unpacked(raw, span.path, span.bounds), HEAD_BYTES), span.encoding)
    raw.seek(0)
    file = unpacked(raw, span.path, span.bounds)
    return (recoded(file, encoding), UTF_8) if is_wide(encoding) else (file, encoding)


def _jsonl(raw: IO[bytes], span: Span, at: _Place) -> Iterator[Entry | Run]:
    at.set(span.start, 1)
    stop = sys.maxsize if span.stop is None else span.stop
    file, encoding = _opened(raw, span)
    for group in line_groups(lines(file, span.bounds.record_bytes, span.start, stop)):
        at.set(group[-1].end, group[-1].number + 1)
        position_bytes = raw.tell()
        fields = parsed_together(group) if encoding == UTF_8 else None
        if fields is not None:
            yield Run(group, position_bytes, fields)
        else:
            for line in group:
                yield _entry_of_line(line, position_bytes, span, encoding)


def _entry_of_line(line: Line, position_bytes: int, span: Span, encoding: str) -> Entry:
    head = (line.begin, line.number, position_bytes)
    if line.content is None:
        problem = f"is a line of more than {span.bounds.record_bytes} bytes"
        return Entry(*head, problem=problem, is_too_large=True)
    begin, is_open = line.content[:HEAD_BYTES], not line.content.endswith(b"\n")
    try:
        fields = line.json(encoding)
    except UnicodeDecodeError as error:
        remedy = advice(begin, span.encoding_key)
        return Entry(*head, problem=f"is not {error.encoding.upper()} at byte {error.start}{remedy}")
    except ValueError as error:
        problem = f"is no JSON: {reason_of(error)}{advice(begin, span.encoding_key) if 0 in begin else ''}"
        if is_open and span.format == "jsonl":
            problem += "; as it has no line break either, the file was perhaps cut off here"
            lost = (max(1, line.number - 1), line.begin if span.start else 0)
            return Entry(*head, problem=problem, is_break=True, lost=lost[0], lost_bytes=lost[1])
        return Entry(*head, problem=problem)
    if not isinstance(fields, dict):
        return Entry(*head, problem=f"is a JSON {type(fields).__name__}, no object")
    return Entry(*head, fields)


def _json(raw: IO[bytes], span: Span, at: _Place) -> Iterator[Entry | Run]:
    """JSON lines, an array of objects, or objects that may span lines; the content decides."""
    at.set(0, 1)
    max_bytes = span.bounds.record_bytes
    head = head_of(_recoded(raw, span), HEAD_BYTES)
    raw.seek(0)
    form = json_form(head, _recoded(raw, span), max_bytes)
    raw.seek(0)
    if form is JsonForm.lines:
        yield from _jsonl(raw, replace(span, format="jsonl"), at)
        return
    for value in json_values(_recoded(raw, span), max_bytes):
        at.set(value.end, value.number + 1)
        entry = _entry_of_line(value, raw.tell(), span, UTF_8)
        # An object of a file of its own may hold many documents, so if it gives none, it counts by its size.
        is_alone = form is JsonForm.values
        yield entry._replace(lost_bytes=value.end - value.begin) if is_alone else entry


def _recoded(raw: IO[bytes], span: Span) -> IO[bytes]:
    """As `_opened`, for formats whose signs may be part of a character in another encoding."""
    file, encoding = _opened(raw, span)
    return file if encoding == UTF_8 else recoded(file, encoding)


def _csv(raw: IO[bytes], span: Span, at: _Place) -> Iterator[Entry]:
    delimiter = "\t" if ".tsv" in span.path.lower()[-9:] else ","
    rows = csv_rows(_recoded(raw, span), span.bounds.record_bytes, delimiter)
    header = next(rows, None)
    if header is None or header.problem:
        raise ValueError(f"its header {header.problem}" if header else "it has no header")
    wanted = span.choose_columns(Header(header.values))
    columns = {name: header.values.index(name) for name in wanted}
    for number, row in enumerate(rows, 1):
        at.set(row.begin, number + 1)
        head = (row.begin, number, raw.tell())
        if row.problem:
            yield Entry(*head, problem=row.problem)
        elif len(row.values) != len(header.values):
            yield Entry(*head, problem=f"has {len(row.values)} values, the header {len(header.values)}")
        else:
            yield Entry(*head, {name: row.values[column] for name, column in columns.items()})


def _parquet(raw: IO[bytes], span: Span, at: _Place) -> Iterator[Entry]:
    require("pyarrow.parquet", span.path)
    file = ParquetFile(raw)
    try:
        columns = span.choose_columns(file.schema)
    except NoTextError as error:
        if span.start == 0:  # once per file
            n_rows = sum(group.n_rows for group in file.groups)
            yield _broken(raw, span, at, error)._replace(lost=max(1, n_rows), lost_bytes=0)
        return
    row = 0
    for number, group in enumerate(file.groups):
        if number >= span.start and (span.stop is None or number < span.stop):
            yield from _rows_of_group(
                raw, span, row, group.n_rows, file.rows(number, columns, _ROWS, span.bounds)
            )
        row += group.n_rows


def _rows_of_group(raw: IO[bytes], span: Span, row: int, n_rows: int, rows: Iterator[Row]) -> Iterator[Entry]:
    """The rows of a row group, of which the first has the number `row`. Other groups can be read if this one cannot."""
    at, stop = _Place(row, row + 1), row + n_rows
    try:
        yield from _rows(raw, at, rows)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        yield _broken(raw, span, at, error)._replace(lost=max(1, stop - at.place), lost_bytes=0)


def _arrow(raw: IO[bytes], span: Span, at: _Place) -> Iterator[Entry]:
    require("pyarrow.ipc", span.path)
    file = ArrowStream(raw, span.bounds)
    columns = span.choose_columns(file.schema)
    at.set(0, 1)
    try:
        yield from _rows(raw, at, file.rows(columns))
    except (OSError, ValueError) as error:
        if raw.tell() >= _size(raw):
            raise CutOffError(reason_of(error)) from error
        raise


def _rows(raw: IO[bytes], at: _Place, rows: Iterator[Row]) -> Iterator[Entry]:
    for found in rows:
        entry = Entry(at.place, at.number, raw.tell(), found.fields or {}, problem=found.problem)
        at.set(at.place + 1, at.number + 1)
        yield entry


def _text(raw: IO[bytes], span: Span, at: _Place) -> Iterator[Entry]:
    max_bytes = span.bounds.record_bytes
    data = read_at_most(unpacked(raw, span.path, span.bounds), max_bytes + 1)
    if len(data) > max_bytes:
        yield Entry(
            0, 1, raw.tell(), problem=f"has more than {max_bytes} bytes", is_too_large=True, is_file=True
        )
        return
    encoding = encoding_of(data[:HEAD_BYTES], span.encoding)
    try:
        yield Entry(0, 1, raw.tell(), text=decode(data, encoding), is_file=True)
    except UnicodeDecodeError as error:
        remedy = advice(data, span.encoding_key)
        problem = f"is not {encoding.upper()} at byte {error.start}{remedy}"
        yield Entry(0, 1, raw.tell(), problem=problem, is_break=True, is_file=True)


def _warc(raw: IO[bytes], span: Span, at: _Place) -> Iterator[Entry]:
    at.set(0, 1)
    for page in pages(unpacked(raw, span.path, span.bounds), span.bounds.record_bytes):
        if page.error is not None:
            at.set(page.number, page.number + 1)
            raise page.error
        at.set(page.number + 1, page.number + 2)
        head = (page.number, page.number + 1, raw.tell())
        yield Entry(*head, text=page.text, url=page.url, problem=page.problem or "")


def _tar(raw: IO[bytes], span: Span, at: _Place) -> Iterator[Entry]:
    at.set(0, 1)
    for sample in samples(unpacked(raw, span.path, span.bounds), span.bounds, span.encoding):
        head = (at.place, at.number, raw.tell())
        at.set(at.place + 1, at.number + 1)
        yield Entry(*head, sample.fields, sample.text, None, sample.problem, sample.is_too_large)
