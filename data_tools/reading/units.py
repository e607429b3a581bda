"""Finds the files that a curation reads, cuts them into units of work, and reads the records of a unit.

Problems with a record or a file are reported to the caller with their place, and reading continues.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from data_tools.reading.bounded import Bounds
from data_tools.reading.columns.columnar import ParquetFile, name_columns, text_problem
from data_tools.reading.encodings import HEAD_BYTES, UTF_8, encoding_of, is_wide, known_encoding
from data_tools.reading.listing import (
    FORMATS,
    FoundFile,
    LeftOut,
    OnLeftOut,
    expand_ranges,
    files_in,
    is_url,
    print_left_out,
    readable,
    reason_of,
    shard_source,
)
from data_tools.reading.reader import Entry, NoTextError, Span, entries, open_file, require
from data_tools.record import Record
from pretrain.config.texts import PathText
from pretrain.errors import ConfigError

Records = Iterator[Record]


class Bad(NamedTuple):
    """A record, a file or a part of one that cannot be read."""

    where: str
    """`<file>` or `<file>:<number>`."""
    why: str
    """The reason. It continues a sentence that begins with the place."""
    is_record: bool = True
    """Whether it is a single record of a file that can be read."""
    lost: int = 1
    """The number of documents that are lost, as far as that is known."""
    lost_bytes: int = 0
    """Where it is not known: the number of bytes of the file that hold these documents."""


OnBad = Callable[[Bad], None]
"""Is called for what cannot be read. It may raise ConfigError to stop."""

# Half of a surrogate pair, which JSON can contain but UTF-8 cannot.
_HALF = re.compile(r"[\ud800-\udfff]")
_NAMES = ("id", "source", "url", "license")


@dataclass(kw_only=True, slots=True)
class ReadConfig:
    """Names of a record's fields, and bounds on what a record and a file may cost."""

    text_field: str = "text"
    """Field of a JSON object, or column of a Parquet or Arrow file, that holds the text."""
    id_field: str = "id"
    """Field of the document's id; without it, the id is `<file>:<number>`."""
    source_field: str = "source"
    """Field of the source; without it, the name of the file, or of the folder of text files."""
    url_field: str = "url"
    """Field of the document's address."""
    license_field: str = "license"
    """Field of the document's license."""
    max_line_bytes: int = 32 << 20
    """Largest size in bytes of a line, text, row, page or sample of a tar; larger ones are bad records."""
    max_ratio: int = 200
    """Largest number of unpacked bytes per packed byte; reading a file, or a row group of Parquet, stops beyond it."""
    max_unpacked_bytes: int = 64 << 30
    """Largest number of unpacked bytes of one compressed file; reading stops beyond it."""
    encoding: str = UTF_8
    """Encoding of text that has no byte-order mark and is not UTF-8: gb18030, utf-16 or utf-16-be."""
    ignore: list[PathText] = field(default_factory=list)
    """Patterns of names of files, or of their paths within an input, that are not to be read, such as '*.html'."""

    def __post_init__(self) -> None:
        known_encoding("read.encoding", self.encoding)
        for name in self.__slots__:
            value = getattr(self, name)
            if value == "" or (isinstance(value, int) and value < 1):
                raise ConfigError(f"read.{name}={value!r}: allowed are names and numbers above 0")

    @property
    def bounds(self) -> Bounds:
        return Bounds(self.max_line_bytes, self.max_ratio, self.max_unpacked_bytes)

    @property
    def codec(self) -> str:
        """`encoding` as Python calls it."""
        return known_encoding("read.encoding", self.encoding)


@dataclass(frozen=True, slots=True)
class Unit:
    """A file, or a part of one, that one process reads at a time."""

    path: str
    """A path on this machine, or a URL of fsspec."""
    name: str
    """Name that does not depend on where the input is stored; it begins the ids of records that have none."""
    source: str
    """The source of records that name none."""
    kind: str
    """The format, a value of FORMATS."""
    start: int = 0
    """Where the unit begins: a byte offset in plain JSONL, or a row group of Parquet.

    A line belongs to the unit in which it begins.
    """
    stop: int | None = None
    """Where the unit ends, in the same unit of measure; None means the end of the file."""
    version: str = ""
    """A value that changes when the file changes."""
    size_bytes: int = 0
    """Approximate number of bytes to read, for the display of progress."""


def units_of(
    inputs: list[str],
    unit_bytes: int,
    options: ReadConfig | None = None,
    on_left_out: OnLeftOut = print_left_out,
) -> list[Unit]:
    """The units of all inputs, in a fixed order. Each real file is read once, however many links lead to it.

    Raises ConfigError where an input does not exist, or has no file that can be read.
    """
    options = options or ReadConfig()
    units, left_out = list[Unit](), list[LeftOut]()
    labels, taken = dict[str, int](), set[str]()
    for entry in expand_ranges(inputs):
        found, others = files_in(_root(entry), {*FORMATS.values()}, options.ignore)
        # A file is listed under its own name rather than that of a link to it.
        files = sorted(found, key=lambda file: os.path.islink(file.path))
        label = os.path.basename((entry if is_url(entry) else os.path.abspath(entry)).rstrip("/"))
        number = labels[label] = labels.get(label, 0) + 1
        label += (
            f"~{number}" if number > 1 else ""
        )  # for inputs with the same name, so that ids of records differ
        for file in files:
            real = file.path if is_url(file.path) else os.path.realpath(file.path)
            if real not in taken:
                taken.add(real)
                units += _cut(file, label, unit_bytes, options)
        left_out += [file._replace(name=readable(f"{label}/{file.name}")) for file in others]
    on_left_out(left_out)
    return units


def _root(entry: str) -> str:
    """An input as a URL or an absolute path."""
    if is_url(entry) and not entry.startswith("file://"):
        return entry
    return os.path.abspath(os.path.expanduser(entry.removeprefix("file://")))


def _cut(file: FoundFile, label: str, unit_bytes: int, options: ReadConfig) -> list[Unit]:
    kind = FORMATS[file.suffix]
    name = readable(f"{label}/{file.relative}" if file.relative else label)
    folder = os.path.basename(os.path.dirname(name))
    # The text files of a folder are one source, and so are the parts of a dataset. Every other file is its own source.
    if kind == "tar":
        source = readable(shard_source(file.path))
    elif file.relative and kind in ("text", "arrow"):
        source = folder or label
    else:
        source = os.path.basename(name[: -len(file.suffix)]) or label
    borders: list[int | None] = [0, None]
    is_plain = file.suffix in (".jsonl", ".ndjson") and file.size_bytes is not None
    if is_plain and _has_lines(file, unit_bytes, options):
        borders = [*range(0, file.size_bytes, max(1, unit_bytes)), file.size_bytes]
    elif kind == "parquet":
        borders = _row_group_borders(file.path, unit_bytes)
    head, version = (file.path, name, source, kind), f"{file.size_bytes} {file.changed}"
    size_bytes = (file.size_bytes or 0) // max(1, len(borders) - 1)
    return [Unit(*head, start or 0, stop, version, size_bytes) for start, stop in pairwise(borders)]


def _has_lines(file: FoundFile, unit_bytes: int, options: ReadConfig) -> bool:
    """Whether lines of a file of JSON lines can be found from any place in it, as they cannot in UTF-16."""
    if (file.size_bytes or 0) <= unit_bytes:
        return True
    try:
        with closing(open_file(file.path)) as raw:
            return not is_wide(encoding_of(raw.read(HEAD_BYTES), options.codec))
    except (OSError, ValueError, ConfigError):  # the error is reported when the unit is read
        return True


def _row_group_borders(path: str, unit_bytes: int) -> list[int | None]:
    require("pyarrow.parquet", path)
    try:
        with closing(open_file(path)) as raw:
            file = ParquetFile(raw)
            sizes = [group.n_bytes for group in file.groups]
    except (OSError, ValueError):  # the error is reported when the unit is read
        return [0, None]
    borders: list[int | None] = [0]
    for group in range(1, len(sizes)):
        if sum(sizes[borders[-1] : group]) >= unit_bytes:
            borders.append(group)
    return [*borders, len(sizes)]


def read_unit(unit: Unit, options: ReadConfig, on_bad: OnBad) -> Records:
    """The unit's records, a few in memory at a time.

    The number in an id does not depend on how files are cut into units. For JSONL it is the byte offset of the line in
    the unpacked file; otherwise it is the number of the row, WARC record or sample of a tar, counted from 0.
    """

    def choose_columns(schema: Any) -> list[str]:
        if problem := text_problem(schema, options.text_field):
            raise NoTextError(problem)
        names = (getattr(options, f"{name}_field") for name in _NAMES)
        return name_columns(schema, [options.text_field, *names])

    place = (unit.start, unit.stop)
    span = Span(unit.path, unit.kind, options.bounds, choose_columns, *place, options.codec, "read.encoding")
    try:
        raw = open_file(unit.path)
    except (ConfigError, OSError, ValueError) as error:
        why = f"cannot be read: {reason_of(error)}"
        on_bad(Bad(unit.name, why, is_record=False, lost_bytes=unit.size_bytes))
        return
    with closing(raw):
        for entry in entries(raw, span):
            where = unit.name if entry.is_file else f"{unit.name}:{entry.place}"
            if entry.problem:
                is_record = not entry.is_break and not entry.lost_bytes
                on_bad(Bad(where, entry.problem, is_record, entry.lost, entry.lost_bytes))
            else:
                yield from _record(unit, where, entry, options, on_bad)


def _record(unit: Unit, where: str, entry: Entry, options: ReadConfig, on_bad: OnBad) -> Records:
    text = entry.text
    if text is None:
        text = entry.fields.get(options.text_field)
        if not isinstance(text, str):
            is_there = options.text_field in entry.fields
            names = ", ".join(map(str, list(entry.fields)[:8])) or "none"
            what = f"holds {type(text).__name__}, no text" if is_there else f"is missing (it has {names})"
            is_record, lost_bytes = not entry.lost_bytes, entry.lost_bytes
            on_bad(Bad(where, f"its field {options.text_field!r} {what}", is_record, lost_bytes=lost_bytes))
            return
        text = _HALF.sub("\ufffd", text)

    def given(name: str) -> str | None:
        value = entry.fields.get(getattr(options, f"{name}_field"))
        is_name = isinstance(value, str | int) and not isinstance(value, bool) and value != ""
        return _HALF.sub("\ufffd", str(value)) if is_name else None

    yield Record(
        id=given("id") or where,
        text=text,
        source=given("source") or unit.source,
        url=given("url") if entry.url is None else entry.url,
        license=given("license"),
    )
