"""Finds the files that a curation reads, cuts them into units of work, and reads the records of a unit.

Problems with a record or a file are reported to the caller with their place, and reading continues.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from data_tools.reading.bounded import BROKEN, Bounds
from data_tools.reading.columnar import ParquetFile, name_columns
from data_tools.reading.reader import (
    FORMATS,
    Entry,
    FoundFile,
    Span,
    entries,
    expand_ranges,
    files_in,
    is_url,
    open_file,
    readable,
    reason_of,
    require,
    shard_source,
    text_problem,
)
from data_tools.record import Record
from pretrain.errors import ConfigError

Records = Iterator[Record]
OnBad = Callable[[str, str], None]
"""Is called for what cannot be read, with the place (`<file>` or `<file>:<number>`) and the reason. It may raise
ConfigError to stop."""

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

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value == "" or (isinstance(value, int) and value < 1):
                raise ConfigError(f"read.{name}={value!r}: allowed are names and numbers above 0")

    @property
    def bounds(self) -> Bounds:
        return Bounds(self.max_line_bytes, self.max_ratio, self.max_unpacked_bytes)


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


def units_of(inputs: list[str], unit_bytes: int) -> list[Unit]:
    """The units of all inputs, in a fixed order. Each real file is read once, however many links lead to it.

    Raises ConfigError where an input does not exist, or has no file that can be read.
    """
    units: list[Unit] = []
    labels, taken = dict[str, int](), set[str]()
    for entry in expand_ranges(inputs):
        # A file is listed under its own name rather than that of a link to it.
        files = sorted(files_in(_root(entry), FORMATS), key=lambda file: os.path.islink(file.path))
        label = os.path.basename((entry if is_url(entry) else os.path.abspath(entry)).rstrip("/"))
        number = labels[label] = labels.get(label, 0) + 1
        label += (
            f"~{number}" if number > 1 else ""
        )  # for inputs with the same name, so that ids of records differ
        for file in files:
            real = file.path if is_url(file.path) else os.path.realpath(file.path)
            if real not in taken:
                taken.add(real)
                units += _cut(file, label, unit_bytes)
    return units


def _root(entry: str) -> str:
    """An input as a URL or an absolute path."""
    if is_url(entry) and not entry.startswith("file://"):
        return entry
    return os.path.abspath(os.path.expanduser(entry.removeprefix("file://")))


def _cut(file: FoundFile, label: str, unit_bytes: int) -> list[Unit]:
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
    if file.suffix == ".jsonl" and file.size_bytes is not None:
        borders = [*range(0, file.size_bytes, max(1, unit_bytes)), file.size_bytes]
    elif kind == "parquet":
        borders = _row_group_borders(file.path, unit_bytes)
    head, version = (file.path, name, source, kind), f"{file.size_bytes} {file.changed}"
    size_bytes = (file.size_bytes or 0) // max(1, len(borders) - 1)
    return [Unit(*head, start or 0, stop, version, size_bytes) for start, stop in pairwise(borders)]


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
            if unit.start == 0:  # once per file
                on_bad(unit.name, problem)
            return []
        names = (getattr(options, f"{name}_field") for name in _NAMES)
        return name_columns(schema, [options.text_field, *names])

    span = Span(unit.path, unit.kind, options.bounds, choose_columns, unit.start, unit.stop)
    try:
        with closing(open_file(unit.path)) as raw:
            for entry in entries(raw, span):
                where = unit.name if unit.kind == "text" else f"{unit.name}:{entry.place}"
                if entry.problem:
                    on_bad(where, entry.problem)
                else:
                    yield from _record(unit, where, entry, options, on_bad)
    except ConfigError:  # the caller wants to stop, or a package is missing
        raise
    except (*BROKEN, ValueError) as error:
        on_bad(unit.name, f"cannot be read: {reason_of(error)}")


def _record(unit: Unit, where: str, entry: Entry, options: ReadConfig, on_bad: OnBad) -> Records:
    text = entry.text
    if text is None:
        text = entry.fields.get(options.text_field)
        if not isinstance(text, str):
            is_there = options.text_field in entry.fields
            what = f"holds {type(text).__name__}, no text" if is_there else "is missing"
            on_bad(where, f"its field {options.text_field!r} {what}")
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
