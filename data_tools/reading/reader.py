"""The one reader of text: which files an input names, which format each of them has, and the records of a file.

`units.py` adapts these records for a curation, and `sources.py` for a preparation. The two differ only in ids, sources
and the description of a bad record. Files are untrusted, so each record is bounded in size before memory is allocated
for it.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

from data_tools.reading.bounded import BROKEN, Bounds, Line, lines, unpacked
from data_tools.reading.columnar import ArrowStream, ParquetFile, Row, is_text, kind_of
from data_tools.reading.tars import samples
from data_tools.reading.warc import pages
from pretrain.errors import ConfigError
from pretrain.files import open_regular, read_at_most
from pretrain.remote import check_url, file_system

FORMATS = {
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".warc": "warc",
    ".warc.gz": "warc",
    ".txt": "text",
    ".md": "text",
    ".tar": "tar",
}
"""The format of a file, by its suffix."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
_SHARD_NUMBER = re.compile(r"[-_.]?\d+(-of-\d+)?$")
_MAX_SHARDS = 100_000
_DATASET_NAME = "dataset_info.json"  # is in the same folder as the Arrow files of a Hugging Face dataset
_ROWS = 64  # largest number of rows that are decoded at a time


# ---- files -----------------------------------------------------------------------------------------------------------


class FoundFile(NamedTuple):
    """A file that an input names."""

    path: str
    """A path on this machine, or a URL."""
    relative: str
    """The path below the input; empty where the file is the input itself."""
    suffix: str
    """The key in FORMATS."""
    size_bytes: int | None
    """Size in bytes; None if the store of a URL does not report it."""
    changed: Any
    """Time of the last change in nanoseconds; for a URL, the version that its store reports."""


def is_url(entry: str) -> bool:
    """Whether an input is a URL."""
    return _URL.match(entry) is not None


def suffix_of(name: str) -> str:
    """The key in FORMATS for a file's name; empty where the format is not known."""
    return next((suffix for suffix in FORMATS if name.lower().endswith(suffix)), "")


def expand_ranges(inputs: list[str]) -> list[str]:
    """The inputs, with `a-{000..099}.tar` expanded to 100 names, whose numbers are padded like the first one.

    A name with braces that exists as it is stays as it is. Raises ConfigError for a range that is empty or too long.
    """
    expanded: list[str] = []
    for entry in inputs:
        found = _RANGE.search(entry)
        if found is None or os.path.exists(os.path.expanduser(entry)):
            expanded.append(entry)
            continue
        first, last = int(found[1]), int(found[2])
        if not 0 <= last - first < _MAX_SHARDS:
            raise ConfigError(
                f"input={entry}: the range {found[0]} must ascend and hold {_MAX_SHARDS:,} numbers at most"
            )
        width = len(found[1]) if found[1].startswith("0") else 0
        head, tail = entry[: found.start()], entry[found.end() :]
        expanded += expand_ranges([f"{head}{number:0{width}}{tail}" for number in range(first, last + 1)])
        if len(expanded) > _MAX_SHARDS:
            raise ConfigError(f"input={entry} stands for more than {_MAX_SHARDS:,} files")
    return expanded


def files_in(entry: str, suffixes: Collection[str], *, follow_links: bool = True) -> list[FoundFile]:
    """The files of an input, ordered by path: the file itself, or all files below a folder except hidden ones.

    With `follow_links`, folders behind links count, and each real folder is entered once. Raises ConfigError where the
    input does not exist, or has no file with one of the suffixes.
    """
    found = _files_behind_url(entry) if is_url(entry) else _local_files(entry, suffixes, follow_links)
    described = {os.path.dirname(file.path) for file in found if _name(file) == _DATASET_NAME}

    def is_wanted(file: FoundFile) -> bool:
        # Arrow files are read where they are the data of a Hugging Face dataset, but not its caches.
        is_cache = os.path.dirname(file.path) not in described or _name(file).startswith("cache-")
        return file.suffix in suffixes and not (file.suffix == ".arrow" and is_cache)

    wanted = sorted(filter(is_wanted, found), key=lambda file: os.fsencode(file.path))
    if not wanted:
        raise ConfigError(f"input={entry} has no file that can be read; known are {', '.join(suffixes)}")
    return wanted


def _name(file: FoundFile) -> str:
    return os.path.basename(file.path)


def _files_behind_url(entry: str) -> list[FoundFile]:
    check_url("input", entry)
    fs, root = file_system(entry)
    try:
        listed = {root: fs.info(root)} if fs.isfile(root) else fs.find(root, detail=True)
    except OSError as error:
        raise ConfigError(f"input={entry} cannot be listed: {reason_of(error)}") from error
    files = []
    for path, info in listed.items():
        relative = "" if path == root else path.removeprefix(root.rstrip("/") + "/")
        if relative == path or any(part.startswith(".") for part in relative.split("/")):
            continue  # outside of the input, or hidden
        changed = info.get("ETag") or info.get("mtime") or info.get("created")
        files.append(
            FoundFile(fs.unstrip_protocol(path), relative, suffix_of(path), info.get("size"), changed)
        )
    return files


def _local_files(root: str, suffixes: Collection[str], follow_links: bool) -> list[FoundFile]:
    if not os.path.exists(root):
        raise ConfigError(f"input={readable(root)} does not exist")
    is_folder = os.path.isdir(root)
    if not is_folder and suffix_of(root) not in suffixes:
        raise ConfigError(f"input={readable(root)} is of an unknown kind; known are {', '.join(suffixes)}")
    if not is_folder and not os.path.isfile(root):
        raise ConfigError(f"input={readable(root)} cannot be read: it is not a regular file")
    try:
        paths = _walk(root, follow_links) if is_folder else [root]
    except OSError as error:
        raise ConfigError(f"input={readable(root)} cannot be listed: {reason_of(error)}") from error
    files = []
    for path in paths:
        if (suffix := suffix_of(path)) or os.path.basename(path) == _DATASET_NAME:
            stat = os.stat(path)
            relative = "" if path == root else os.path.relpath(path, root)
            files.append(FoundFile(path, relative, suffix, stat.st_size, stat.st_mtime_ns))
    return files


def _walk(root: str, follow_links: bool) -> list[str]:
    """The files below a folder that are not hidden. Each real folder is entered once; links to folders come last."""
    paths, seen = list[str](), set[str]()
    folders, links = [root], list[str]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        if (real := os.path.realpath(folder)) in seen:
            continue
        seen.add(real)
        names = [name for name in os.listdir(folder) if not name.startswith(".")]
        for path in (os.path.join(folder, name) for name in sorted(names, key=os.fsencode)):
            if os.path.isdir(path):
                if not os.path.islink(path):
                    folders.append(path)
                elif follow_links:
                    links.append(path)
            elif os.path.isfile(path):
                paths.append(path)
    return paths


def readable(name: str) -> str:
    """A file name as text. Invalid UTF-8 and control characters become \\x.., so that names stay different."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def shard_source(path: str) -> str:
    """The source of a tar: its name without the shard number (`web` for `web-000.tar`), or else its folder."""
    name = os.path.basename(path)
    folder = os.path.basename(os.path.dirname(path if is_url(path) else os.path.abspath(path)))
    return _SHARD_NUMBER.sub("", name[: -len(".tar")]) or folder or name


def open_file(path: str) -> IO[bytes]:
    """Open a regular file of this machine, or a URL."""
    if not is_url(path):
        return open_regular(path)
    fs, at = file_system(path)
    return fs.open(at, "rb")


def reason_of(error: BaseException) -> str:
    """The message of an error, in one line."""
    return getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__


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
    """Whether the problem is in the file, so that at least part of what follows cannot be read."""


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
    """Chooses the columns to read from the Arrow schema of a table; a table without any is skipped."""
    start: int = 0
    """Where the span begins: a byte offset in plain JSONL, or a row group of Parquet.

    A line belongs to the span in which it begins.
    """
    stop: int | None = None
    """Where the span ends, in the same unit; None means the end of the file."""


def entries(raw: IO[bytes], span: Span) -> Iterator[Entry]:
    """The records of a file, a few in memory at a time.

    Raises OSError and ValueError where the file as a whole cannot be read, and ConfigError where a package is missing.
    """
    readers = {
        "jsonl": _jsonl,
        "parquet": _parquet,
        "arrow": _arrow,
        "text": _text,
        "warc": _warc,
        "tar": _tar,
    }
    return readers[span.format](raw, span)


def _broken(place: int, number: int, position_bytes: int, error: BaseException) -> Entry:
    problem = f"cannot be read from here on: {reason_of(error)}"
    return Entry(place, number, position_bytes, problem=problem, is_break=True)


def _jsonl(raw: IO[bytes], span: Span) -> Iterator[Entry]:
    stop = sys.maxsize if span.stop is None else span.stop
    at, number = span.start, 1
    file = unpacked(raw, span.path, span.bounds)
    found = lines(file, span.bounds.record_bytes, span.start, stop)
    while True:
        try:
            line = next(found, None)
        except BROKEN as error:
            yield _broken(at, number, raw.tell(), error)
            return
        if line is None:
            return
        at, number = line.end, line.number + 1
        yield _entry_of_line(line, raw.tell(), span.bounds.record_bytes)


def _entry_of_line(line: Line, position_bytes: int, max_bytes: int) -> Entry:
    head = (line.begin, line.number, position_bytes)
    if line.content is None:
        return Entry(*head, problem=f"is a line of more than {max_bytes} bytes", is_too_large=True)
    try:
        fields = line.json()
    except ValueError as error:
        return Entry(*head, problem=f"is no JSON: {reason_of(error)}")
    if not isinstance(fields, dict):
        return Entry(*head, problem=f"is a JSON {type(fields).__name__}, no object")
    return Entry(*head, fields)


def _parquet(raw: IO[bytes], span: Span) -> Iterator[Entry]:
    require("pyarrow.parquet", span.path)
    file = ParquetFile(raw)
    columns = span.choose_columns(file.schema)
    row = 0
    for number, group in enumerate(file.groups if columns else ()):
        if number >= span.start and (span.stop is None or number < span.stop):
            yield from _rows(raw, row, file.rows(number, columns, _ROWS, span.bounds))
        row += group.n_rows


def _arrow(raw: IO[bytes], span: Span) -> Iterator[Entry]:
    require("pyarrow.ipc", span.path)
    file = ArrowStream(raw, span.bounds)
    columns = span.choose_columns(file.schema)
    if columns:
        yield from _rows(raw, 0, file.rows(columns))


def _rows(raw: IO[bytes], row: int, rows: Iterator[Row]) -> Iterator[Entry]:
    while True:
        try:
            found = next(rows, None)
        except ConfigError:
            raise
        except (OSError, ValueError) as error:
            yield _broken(row, row + 1, raw.tell(), error)
            return
        if found is None:
            return
        yield Entry(row, row + 1, raw.tell(), found.fields or {}, problem=found.problem)
        row += 1


def text_problem(schema: Any, name: str) -> str | None:
    """The reason why a table has no text in the column of this name, or None if it has."""
    if name not in schema.names:
        return f"has no column {name!r} (it has {', '.join(schema.names[:8])})"
    kind = kind_of(schema, name)
    return None if is_text(kind) else f"its column {name!r} holds {kind}, no text"


def read_whole(raw: IO[bytes], max_bytes: int) -> bytes:
    """The whole content of a file. Raises ValueError if it is larger than `max_bytes`."""
    data = read_at_most(raw, max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"it has more than {max_bytes} bytes")
    return data


def _text(raw: IO[bytes], span: Span) -> Iterator[Entry]:
    data = read_whole(raw, span.bounds.record_bytes)
    yield Entry(0, 1, len(data), text=data.decode("utf-8-sig"))


def _warc(raw: IO[bytes], span: Span) -> Iterator[Entry]:
    for page in pages(unpacked(raw, span.path, span.bounds), span.bounds.record_bytes):
        head = (page.number, page.number + 1, raw.tell())
        yield Entry(*head, text=page.text, url=page.url, problem=page.problem or "")


def _tar(raw: IO[bytes], span: Span) -> Iterator[Entry]:
    number = 0
    found = samples(unpacked(raw, span.path, span.bounds), span.bounds)
    while True:
        try:
            sample = next(found, None)
        except (*BROKEN, ValueError) as error:
            yield _broken(number, number + 1, raw.tell(), error)
            return
        if sample is None:
            return
        yield Entry(
            number,
            number + 1,
            raw.tell(),
            sample.fields,
            sample.text,
            None,
            sample.problem,
            sample.is_too_large,
        )
        number += 1
