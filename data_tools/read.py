"""Where text comes from: the files that the inputs name, cut into units of work, and the records of a unit.

What is wrong with a record or a file is told to the caller, with its place; reading goes on.
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from typing import IO, Any, NamedTuple

from data_tools.boilerplate import BROKEN, pages
from data_tools.record import Record
from pretrain.config import ConfigError
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
# zstd can make 32 MB of 1 KB: what is unpacked at once stays bounded.
_ZST_BYTES = 1024
# Small files may be of any ratio: a page of blanks is no attack.
_BOMB_FREE_BYTES = 16 << 20
_FIELDS = ("text", "id", "source", "url", "license")


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
    """Longer lines, texts and pages are bad records."""
    max_ratio: int = 200
    """Unpacked bytes per packed byte; a file beyond it is given up, as are Parquet files that claim it."""
    max_unpacked_bytes: int = 64 << 30
    """Unpacked bytes of one compressed file; it is given up beyond them."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value == "" or (isinstance(value, int) and value < 1):
                raise ConfigError(f"read.{name}={value!r}: allowed are names and numbers above 0")


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
    parquet = _needed("pyarrow.parquet", path)
    try:
        with closing(_open(path)) as raw:
            metadata = parquet.ParquetFile(raw).metadata
            sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    except (OSError, ValueError):  # ArrowInvalid is a ValueError; reading the unit will name the file
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
        return open(path, "rb", buffering=_BUFFER_BYTES)
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
    except (*BROKEN, ValueError) as error:  # ArrowInvalid is a ValueError
        on_bad(unit.name, f"cannot be read: {_reason(error)}")


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__


def _jsonl(unit: Unit, raw: IO[bytes], options: ReadConfig, on_bad: OnBad) -> Records:
    file = io.BufferedReader(_unpacked(unit.path, raw, options), _BUFFER_BYTES)
    for offset, line in _lines(unit, file, options.max_line_bytes, on_bad):
        try:
            fields: Any = json.loads(line.decode("utf-8-sig" if offset == 0 else "utf-8"))
        except (ValueError, RecursionError) as error:
            on_bad(f"{unit.name}:{offset}", f"is no JSON: {_reason(error)}")
            continue
        if isinstance(fields, dict):
            yield from _record(unit, offset, fields, options, on_bad)
        else:
            on_bad(f"{unit.name}:{offset}", f"is a JSON {type(fields).__name__}, no object")


def _lines(unit: Unit, file: io.BufferedReader, max_bytes: int, on_bad: OnBad) -> Iterator[tuple[int, bytes]]:
    """Lines that begin in the unit, with their first byte; blank ones are passed over."""
    stop = sys.maxsize if unit.stop is None else unit.stop
    at = unit.start
    try:
        if at:  # the line that reaches into the unit belongs to the one before
            file.seek(at - 1)
            at += _skip_line(file, stop - at + 1) - 1
        while at < stop and (line := file.readline(max_bytes + 1)):
            begin, at = at, at + len(line)
            if len(line) > max_bytes and not line.endswith(b"\n"):
                on_bad(f"{unit.name}:{begin}", f"is a line of more than {max_bytes} bytes")
                at += _skip_line(file, stop - at)
            elif not line.isspace():
                yield begin, line
    except BROKEN as error:
        on_bad(f"{unit.name}:{at}", f"cannot be read from here on: {_reason(error)}")


def _skip_line(file: io.BufferedReader, max_bytes: int) -> int:
    """Bytes to the end of the line, or `max_bytes` of them."""
    skipped = 0
    while skipped < max_bytes:
        part = file.readline(min(_BUFFER_BYTES, max_bytes - skipped))
        skipped += len(part)
        if not part or part.endswith(b"\n"):
            break
    return skipped


def _unpacked(path: str, raw: IO[bytes], options: ReadConfig) -> IO[bytes]:
    """The file's bytes, a piece at a time: what comes before the place of an error is not lost."""
    if path.lower().endswith(".zst"):
        return _Unpacker(raw, _unzstd(raw), options)
    is_gzip = path.lower().endswith(".gz")
    if path.lower().endswith(".warc"):  # its reader unpacks by itself, without a bound
        is_gzip = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
    if is_gzip:
        file = gzip.GzipFile(fileobj=raw)
        return _Unpacker(raw, iter(lambda: file.read1(_BUFFER_BYTES), b""), options)
    return raw


class _Unpacker(io.RawIOBase):
    """Pieces of bytes as a file, with bounds on how much they may be. Raises OSError beyond them."""

    def __init__(self, packed: IO[bytes], pieces: Iterator[bytes], options: ReadConfig) -> None:
        self._packed, self._pieces, self._options = packed, pieces, options
        self._left = memoryview(b"")
        self._size_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            try:
                self._left = memoryview(next(self._pieces, b""))
            except EOFError as error:  # which readers of archives take for the end of a whole file
                raise OSError(str(error)) from error
            self._size_bytes += len(self._left)
            ratio, most = self._options.max_ratio, self._options.max_unpacked_bytes
            if self._size_bytes > most:
                raise OSError(f"unpacks to more than {most} bytes")
            if self._size_bytes > max(_BOMB_FREE_BYTES, ratio * self._packed.tell()):
                raise OSError(f"unpacks to more than {ratio} times its size")
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size


def _unzstd(raw: IO[bytes]) -> Iterator[bytes]:
    zstandard = _needed("zstandard", "a .zst file")
    frame = None
    try:
        while packed := raw.read(_ZST_BYTES):
            while packed:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                if piece := frame.decompress(packed):
                    yield piece
                packed = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from error
    if frame is not None:
        raise EOFError("the compressed file ends too early")


def _parquet(unit: Unit, raw: IO[bytes], options: ReadConfig, on_bad: OnBad) -> Records:
    file = _needed("pyarrow.parquet", unit.path).ParquetFile(raw, buffer_size=_BUFFER_BYTES)
    names = file.schema_arrow.names
    columns = _columns(unit, names, options, on_bad)
    row = 0
    for group in range(file.metadata.num_row_groups if columns else 0):
        if group >= unit.start and (unit.stop is None or group < unit.stop):
            text = file.metadata.row_group(group).column(names.index(options.text_field))
            most_bytes = max(_BOMB_FREE_BYTES, options.max_ratio * text.total_compressed_size)
            if text.total_uncompressed_size > most_bytes:
                on_bad(f"{unit.name}:{row}", f"unpacks to more than {options.max_ratio} times its size")
            else:
                batches = file.iter_batches(_ROWS, [group], columns, use_threads=False)
                yield from _rows(unit, row, batches, options, on_bad)
        row += file.metadata.row_group(group).num_rows


def _arrow(unit: Unit, raw: IO[bytes], options: ReadConfig, on_bad: OnBad) -> Records:
    """The stream format, as Hugging Face datasets are saved."""
    reader = _needed("pyarrow.ipc", unit.path).open_stream(raw)
    columns = _columns(unit, reader.schema.names, options, on_bad)
    if columns:
        yield from _rows(unit, 0, (batch.select(columns) for batch in reader), options, on_bad)


def _columns(unit: Unit, names: list[str], options: ReadConfig, on_bad: OnBad) -> list[str]:
    if options.text_field not in names:
        if unit.start == 0:  # once per file
            on_bad(unit.name, f"has no column {options.text_field!r} (it has {', '.join(names[:8])})")
        return []
    return [c for c in dict.fromkeys(getattr(options, f"{field}_field") for field in _FIELDS) if c in names]


def _rows(unit: Unit, row: int, batches: Iterator[Any], options: ReadConfig, on_bad: OnBad) -> Records:
    try:
        for batch in batches:
            for i in range(len(batch)):
                try:
                    [fields] = batch.slice(i, 1).to_pylist()
                except UnicodeDecodeError:
                    on_bad(f"{unit.name}:{row}", "is not UTF-8")
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
    for number, url, text, problem in pages(_unpacked(unit.path, raw, options), options.max_line_bytes):
        if problem:
            on_bad(f"{unit.name}:{number}", problem)
        else:
            yield Record(id=f"{unit.name}:{number}", text=text, source=unit.source, url=url)


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
