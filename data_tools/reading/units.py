"""Where text comes from: the files that the inputs name, cut into units of work, and the records of a unit.

What is wrong with a record or a file is told to the caller, with its place; reading goes on.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from typing import IO, Any, NamedTuple

from data_tools.reading.bounded import BROKEN, Bounds, lines, unpacked
from data_tools.reading.columnar import ArrowStream, ParquetFile, Row, is_text, kind_of, name_columns
from data_tools.reading.warc import pages
from data_tools.record import Record
from pretrain.errors import ConfigError
from pretrain.files import open_regular
from pretrain.remote import check_url, file_system

_JSONL = dict.fromkeys([".jsonl", ".jsonl.gz", ".jsonl.zst"], "jsonl")
_OTHER = {".parquet": "parquet", ".arrow": "arrow", ".warc": "warc", ".warc.gz": "warc"}
KINDS = _JSONL | _OTHER | {".txt": "text", ".md": "text"}
"""Kind of a file by the end of its name."""

Records = Iterator[Record]
OnBad = Callable[[str, str], None]
"""Told of what cannot be read: where (`<file>` or `<file>:<number>`) and why. May raise ConfigError to stop."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f]")
# Half of a surrogate pair: JSON may hold it, UTF-8 may not.
_HALF = re.compile(r"[\ud800-\udfff]")
_BUFFER_BYTES = 1 << 20
_ROWS = 64
_NAMES = ("id", "source", "url", "license")


@dataclass(kw_only=True, slots=True)
class ReadConfig:
    """Fields of records, and bounds on what one of them may cost."""

    text_field: str = "text"
    """Field of a JSON line, or column of a Parquet or Arrow file, that holds the text."""
    id_field: str = "id"
    """Field of the document's name; without it: `<file>:<number>`."""
    source_field: str = "source"
    """Field of the source; without it: the name of the file, or of the folder of text files."""
    url_field: str = "url"
    """Field of the address."""
    license_field: str = "license"
    """Field of the license."""
    max_line_bytes: int = 32 << 20
    """Longer lines, texts, rows and pages are bad records."""
    max_ratio: int = 200
    """Unpacked bytes per packed byte; a file, or a row group of Parquet, is given up beyond it."""
    max_unpacked_bytes: int = 64 << 30
    """Unpacked bytes of one compressed file; it is given up beyond them."""

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
    """A file, or a part of one, that one process reads at a time.

    `name` is the same wherever the input lies, and begins the ids of records that have none. `path` is on
    this machine, or a URL of fsspec. `start` and `stop` (null: to the end) are bytes of plain JSONL, whose
    lines belong to the unit in which they begin, and row groups of Parquet. `version` changes when the file does.
    """

    path: str
    name: str
    source: str
    kind: str
    start: int = 0
    stop: int | None = None
    version: str = ""
    size_bytes: int = 0
    """About how much there is to read, for the display of progress."""


class _Found(NamedTuple):
    path: str
    relative: str  # empty where the file is the input itself
    size_bytes: int | None
    version: str


def units_of(inputs: list[str], unit_bytes: int) -> list[Unit]:
    """All of the inputs' text, in a fixed order. Each real file is there once, however many links lead to it.

    Raises ConfigError where an input does not exist, or has no file that can be read.
    """
    units: list[Unit] = []
    labels, taken = dict[str, int](), set[str]()
    for entry in inputs:
        files = list(_files_of(entry))
        if not files:
            raise ConfigError(f"input={entry} has no file that can be read; known are {', '.join(KINDS)}")
        label = os.path.basename((entry if _URL.match(entry) else os.path.abspath(entry)).rstrip("/"))
        number = labels[label] = labels.get(label, 0) + 1
        label += f"~{number}" if number > 1 else ""  # inputs of one name: their records' ids must differ
        for file in files:
            real = file.path if _URL.match(file.path) else os.path.realpath(file.path)
            if real not in taken:
                taken.add(real)
                units += _cut(file, label, unit_bytes)
    return units


def _files_of(entry: str) -> list[_Found]:
    if not _URL.match(entry) or entry.startswith("file://"):
        return _local_files(os.path.abspath(os.path.expanduser(entry.removeprefix("file://"))))
    check_url("input", entry)
    fs, root = file_system(entry)
    try:
        listed = {root: fs.info(root)} if fs.isfile(root) else fs.find(root, detail=True)
    except OSError as error:
        raise ConfigError(f"input={entry} cannot be listed: {_reason(error)}") from error
    files = []
    for path in _known(list(listed)):
        info = listed[path]
        relative = "" if path == root else path.removeprefix(root.rstrip("/") + "/")  # else it lies elsewhere
        if relative != path and not any(part.startswith(".") for part in relative.split("/")):
            version = f"{info.get('size')} {info.get('ETag') or info.get('mtime') or info.get('created')}"
            files.append(_Found(fs.unstrip_protocol(path), relative, info.get("size"), version))
    return files


def _local_files(root: str) -> list[_Found]:
    try:
        paths = _known([root] if os.path.isfile(root) else _walk(root))
    except OSError as error:
        raise ConfigError(f"input={_readable(root)} cannot be listed: {_reason(error)}") from error
    files = []
    for path in sorted(paths, key=os.path.islink):  # a file's own name goes before that of a link to it
        stat = os.stat(path)
        relative = "" if path == root else os.path.relpath(path, root)
        files.append(_Found(path, relative, stat.st_size, f"{stat.st_size} {stat.st_mtime_ns}"))
    return files


def _walk(root: str) -> list[str]:
    """Files below a folder that are not hidden. Each real folder is entered once; links to folders come last."""
    paths, seen = list[str](), set[str]()
    folders, links = [root], []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        if (real := os.path.realpath(folder)) in seen:
            continue
        seen.add(real)
        names = [name for name in os.listdir(folder) if not name.startswith(".")]
        for path in (os.path.join(folder, name) for name in sorted(names, key=os.fsencode)):
            if os.path.isdir(path):
                (links if os.path.islink(path) else folders).append(path)
            elif os.path.isfile(path):
                paths.append(path)
    return paths


def _known(paths: list[str]) -> list[str]:
    """Those of a known kind, in order; Arrow files only where they are a Hugging Face dataset's data."""
    described = {os.path.dirname(path) for path in paths if os.path.basename(path) == "dataset_info.json"}

    def is_known(path: str) -> bool:
        folder, name = os.path.split(path)
        is_cache = folder not in described or name.startswith("cache-")
        return bool(_suffix(name)) and not (name.endswith(".arrow") and is_cache)

    return sorted(filter(is_known, paths), key=os.fsencode)


def _suffix(path: str) -> str:
    return next((suffix for suffix in KINDS if path.lower().endswith(suffix)), "")


def _readable(name: str) -> str:
    """A file name as text: bytes that are no UTF-8, and control characters, as \\x..; different names stay so."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return _UNPRINTABLE.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def _cut(file: _Found, label: str, unit_bytes: int) -> list[Unit]:
    suffix = _suffix(file.path)
    kind = KINDS[suffix]
    name = _readable(f"{label}/{file.relative}" if file.relative else label)
    # Text files of a folder are one source, the parts of an Arrow dataset as well; other files are one each.
    is_part = file.relative and kind in ("text", "arrow")
    source = os.path.basename(os.path.dirname(name) if is_part else name[: -len(suffix)]) or label
    borders: list[int | None] = [0, None]
    if suffix == ".jsonl" and file.size_bytes is not None:
        borders = [*range(0, file.size_bytes, max(1, unit_bytes)), file.size_bytes]
    elif kind == "parquet":
        borders = _row_group_borders(file.path, unit_bytes)
    head, size_bytes = (file.path, name, source, kind), (file.size_bytes or 0) // max(1, len(borders) - 1)
    return [Unit(*head, start or 0, stop, file.version, size_bytes) for start, stop in pairwise(borders)]


def _row_group_borders(path: str, unit_bytes: int) -> list[int | None]:
    _needed("pyarrow.parquet", path)
    try:
        with closing(_open(path)) as raw:
            file = ParquetFile(raw)
            sizes = [group.n_bytes for group in file.groups]
    except (OSError, ValueError):  # reading the unit will name the file
        return [0, None]
    borders: list[int | None] = [0]
    for group in range(1, len(sizes)):
        if sum(sizes[borders[-1] : group]) >= unit_bytes:
            borders.append(group)
    return [*borders, len(sizes)]


def _needed(module: str, path: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{path} needs {module}: pip install 'pretrain[data]'") from error


def _open(path: str) -> IO[bytes]:
    if not _URL.match(path):
        return open_regular(path)
    fs, at = file_system(path)
    return fs.open(at, "rb")


def read_unit(unit: Unit, options: ReadConfig, on_bad: OnBad) -> Records:
    """The unit's records, a few in memory at a time.

    The number in an id is a place that does not depend on how files are cut: the line's first byte in
    the unpacked JSONL, the row of a Parquet or Arrow file, the record of a WARC file, from 0.
    """
    readers = {"jsonl": _jsonl, "parquet": _parquet, "arrow": _arrow, "text": _text, "warc": _warc}
    try:
        with closing(_open(unit.path)) as raw:
            yield from readers[unit.kind](unit, raw, options, on_bad)
    except ConfigError:  # the caller has had enough, or a package is missing
        raise
    except (*BROKEN, ValueError) as error:
        on_bad(unit.name, f"cannot be read: {_reason(error)}")


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__


def _jsonl(unit: Unit, raw: IO[bytes], options: ReadConfig, on_bad: OnBad) -> Records:
    stop = sys.maxsize if unit.stop is None else unit.stop
    at = unit.start
    try:
        for line in lines(unpacked(raw, unit.path, options.bounds), options.max_line_bytes, unit.start, stop):
            at = line.end
            where = f"{unit.name}:{line.begin}"
            if line.content is None:
                on_bad(where, f"is a line of more than {options.max_line_bytes} bytes")
                continue
            try:
                fields: Any = line.json()
            except ValueError as error:
                on_bad(where, f"is no JSON: {_reason(error)}")
                continue
            if isinstance(fields, dict):
                yield from _record(unit, line.begin, fields, options, on_bad)
            else:
                on_bad(where, f"is a JSON {type(fields).__name__}, no object")
    except OSError as error:
        on_bad(f"{unit.name}:{at}", f"cannot be read from here on: {_reason(error)}")


def _parquet(unit: Unit, raw: IO[bytes], options: ReadConfig, on_bad: OnBad) -> Records:
    _needed("pyarrow.parquet", unit.path)
    file = ParquetFile(raw)
    columns = _columns(unit, file.schema, options, on_bad)
    row = 0
    for group in range(len(file.groups) if columns else 0):
        if group >= unit.start and (unit.stop is None or group < unit.stop):
            yield from _rows(unit, row, file.rows(group, columns, _ROWS, options.bounds), options, on_bad)
        row += file.groups[group].n_rows


def _arrow(unit: Unit, raw: IO[bytes], options: ReadConfig, on_bad: OnBad) -> Records:
    _needed("pyarrow.ipc", unit.path)
    file = ArrowStream(raw, options.bounds)
    columns = _columns(unit, file.schema, options, on_bad)
    if columns:
        yield from _rows(unit, 0, file.rows(columns), options, on_bad)


def _columns(unit: Unit, schema: Any, options: ReadConfig, on_bad: OnBad) -> list[str]:
    """The columns to read; none where there is no text, which is told once per file."""
    name, problem = options.text_field, None
    if name not in schema.names:
        problem = f"has no column {name!r} (it has {', '.join(schema.names[:8])})"
    elif not is_text(kind_of(schema, name)):
        problem = f"its column {name!r} holds {kind_of(schema, name)}, no text"
    if problem:
        if unit.start == 0:
            on_bad(unit.name, problem)
        return []
    return name_columns(schema, [name, *(getattr(options, f"{field}_field") for field in _NAMES)])


def _rows(unit: Unit, row: int, rows: Iterator[Row], options: ReadConfig, on_bad: OnBad) -> Records:
    try:
        for fields, problem in rows:
            if fields is None:
                on_bad(f"{unit.name}:{row}", problem)
            else:
                yield from _record(unit, row, fields, options, on_bad)
            row += 1
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        on_bad(f"{unit.name}:{row}", f"cannot be read from here on: {_reason(error)}")


def _text(unit: Unit, raw: IO[bytes], options: ReadConfig, on_bad: OnBad) -> Records:
    data = raw.read(options.max_line_bytes + 1)
    if len(data) > options.max_line_bytes:
        raise ValueError(f"it has more than {options.max_line_bytes} bytes")
    yield Record(id=unit.name, text=data.decode("utf-8-sig"), source=unit.source)


def _warc(unit: Unit, raw: IO[bytes], options: ReadConfig, on_bad: OnBad) -> Records:
    for page in pages(unpacked(raw, unit.path, options.bounds), options.max_line_bytes):
        if page.problem:
            on_bad(f"{unit.name}:{page.number}", page.problem)
        else:
            yield Record(id=f"{unit.name}:{page.number}", text=page.text, source=unit.source, url=page.url)


def _record(unit: Unit, number: int, fields: dict[str, Any], options: ReadConfig, on_bad: OnBad) -> Records:
    where = f"{unit.name}:{number}"
    text = fields.get(options.text_field)
    if not isinstance(text, str):
        what = f"holds {type(text).__name__}, no text" if options.text_field in fields else "is missing"
        on_bad(where, f"its field {options.text_field!r} {what}")
        return

    def given(name: str) -> str | None:
        value = fields.get(getattr(options, f"{name}_field"))
        is_name = isinstance(value, str | int) and not isinstance(value, bool) and value != ""
        return _HALF.sub("\ufffd", str(value)) if is_name else None

    yield Record(
        id=given("id") or where,
        text=_HALF.sub("\ufffd", text),
        source=given("source") or unit.source,
        url=given("url"),
        license=given("license"),
    )
