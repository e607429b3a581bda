"""Where text comes from: the files that an input names, and the documents in each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data_tools.config import DocumentFormat, PrepareConfig
from data_tools.reading import dialogue
from data_tools.reading.bounded import Bounds, TooManyValuesError, lines, unpacked
from data_tools.reading.columnar import ParquetFile, is_text, kind_of, name_columns
from data_tools.reading.python_text import python_files
from pretrain.errors import ConfigError
from pretrain.files import open_regular, read_capped

TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", *TEXT_SUFFIXES)
PYTHON = "python"
UTF8_BYTES_PER_CHAR = 4
_PARQUET_ROWS = 256


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file to read. `name` is the same wherever the input lies, and begins each document's id."""

    name: str
    path: Path
    source: str
    license: str
    size_bytes: int
    version: int
    """Changes when the file does."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text as it was read."""

    id: str
    source: str
    license: str
    text: str
    """Of a dialogue, what `dialogue.dump` makes of it."""
    position_bytes: int
    """How much of the file has been read."""
    language: str = ""
    """As data_tools.curate writes it; empty where it is not known."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that gives no document. `is_error`: the file is not as it should be."""

    reason: str
    where: str
    position_bytes: int
    is_error: bool


def find_files(config: PrepareConfig) -> list[InputFile]:
    """The files that `config.input` names, in a fixed order. Raises ConfigError."""
    files: list[InputFile] = []
    labels: dict[str, int] = {}
    is_chat = config.format is DocumentFormat.chat
    suffixes = tuple(s for s in SUFFIXES if not (is_chat and s in TEXT_SUFFIXES))
    for entry in config.input:
        if entry == PYTHON and is_chat:
            raise ConfigError(f"input=[{PYTHON}] holds no dialogues; give files for format=chat")
        if entry == PYTHON:
            limit = config.max_chars * UTF8_BYTES_PER_CHAR
            files += [
                InputFile(f.name, f.path, f.source, f.license, f.size_bytes, 0)
                for f in python_files(config.python_max_bytes, limit)
            ]
            continue
        root = Path(entry).expanduser()
        label = root.resolve().name or "input"
        labels[label] = labels.get(label, 0) + 1
        if labels[label] > 1:  # another input of that name: their documents' ids must differ
            label = f"{label}~{labels[label]}"
        files += _files_below(root, label, config.license, suffixes)
    return files


def _files_below(root: Path, label: str, license: str, suffixes: tuple[str, ...]) -> list[InputFile]:
    if root.is_dir():
        found = sorted(path for path in root.rglob("*") if not _hidden(path.relative_to(root)))
        found = [path for path in found if path.is_file() and _suffix(path) in suffixes]
        if not found:
            raise ConfigError(f"input={root} has no file that can be read; known are {', '.join(suffixes)}")
    elif not root.exists():
        raise ConfigError(f"input={root} does not exist")
    elif _suffix(root) not in suffixes:
        raise ConfigError(f"input={root} is of an unknown kind; known are {', '.join(suffixes)}")
    else:
        found = [root]
    files = []
    for path in found:
        relative = str(path.relative_to(root)) if path != root else ""
        name = _readable(f"{label}/{relative}" if relative else label)
        # Each text file of a folder is one document; a file of records is a source by itself.
        is_part = path != root and path.suffix in TEXT_SUFFIXES
        source = _readable(label if is_part else path.name.removesuffix(_suffix(path)))
        stat = path.stat()
        files.append(InputFile(name, path, source, license, stat.st_size, stat.st_mtime_ns))
    return files


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _suffix(path: Path) -> str:
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")


def _readable(name: str) -> str:
    """A file name without the bytes that are no UTF-8."""
    return name.encode("utf-8", "replace").decode()


def read_documents(file: InputFile, config: PrepareConfig) -> Iterator[Document | Rejected]:
    """Every record of a file. Raises ConfigError where the file as a whole cannot be read."""
    suffix = _suffix(file.path)
    try:
        if suffix == ".parquet" or suffix.startswith(".jsonl"):
            with open_regular(file.path) as raw:
                read = _read_parquet if suffix == ".parquet" else _read_jsonl
                yield from read(file, raw, config)
        else:
            yield _read_text(file, config.max_chars)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__
        raise ConfigError(f"{file.path} cannot be read: {reason}") from error


def _read_text(file: InputFile, max_chars: int) -> Document | Rejected:
    most_bytes = max_chars * UTF8_BYTES_PER_CHAR
    if file.size_bytes > most_bytes:
        return Rejected("too_long", str(file.path), file.size_bytes, is_error=False)
    try:
        text = read_capped(file.path, most_bytes).decode("utf-8")
    except UnicodeDecodeError:
        return Rejected("not_utf8", str(file.path), file.size_bytes, is_error=False)
    return Document(file.name, file.source, file.license, text, file.size_bytes)


def _read_jsonl(file: InputFile, raw: IO[bytes], config: PrepareConfig) -> Iterator[Document | Rejected]:
    bounds = Bounds(config.max_record_bytes)
    for line in lines(unpacked(raw, file.path.name, bounds), bounds.record_bytes):
        where = f"{file.path}:{line.number}"
        if line.content is None:
            yield _too_large(where, "line", config, raw.tell())
            continue
        try:
            record: Any = line.json()
        except ValueError as error:
            what = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else "is no JSON"
            what = str(error) if isinstance(error, TooManyValuesError) else what
            yield Rejected("bad_record", f"{where} {what}", raw.tell(), is_error=True)
            continue
        if not isinstance(record, dict):
            yield Rejected("bad_record", f"{where} is no JSON object", raw.tell(), is_error=True)
            continue
        yield _document(file, record, line.number, config, raw.tell())


def _too_large(where: str, what: str, config: PrepareConfig, position_bytes: int) -> Rejected:
    most = config.max_record_bytes
    why = f"{where} is a {what} of more than {most} bytes, and max_record_bytes={most} allows no more"
    return Rejected("bad_record", why, position_bytes, is_error=True)


def _read_parquet(file: InputFile, raw: IO[bytes], config: PrepareConfig) -> Iterator[Document | Rejected]:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{file.path} is Parquet, which needs pyarrow: pip install 'pretrain[data]'"
        ) from error
    number = 0
    try:
        table = ParquetFile(raw)
        columns = _columns(file, table, config)
        n_rows = sum(group.n_rows for group in table.groups)
        for group in range(len(table.groups)):
            for fields, problem in table.rows(group, columns, _PARQUET_ROWS, Bounds(config.max_record_bytes)):
                number += 1
                position = file.size_bytes * number // max(number, n_rows)
                if fields is not None:
                    yield _document(file, fields, number, config, position)
                else:
                    yield Rejected("bad_record", f"{file.path}:{number} {problem}", position, is_error=True)
    except ConfigError:
        raise
    except ValueError as error:
        where = f"{file.path}, after row {number}," if number else str(file.path)
        raise ConfigError(f"{where} is no good Parquet file: {error}") from error


def _columns(file: InputFile, table: ParquetFile, config: PrepareConfig) -> list[str]:
    """The columns to read. Raises ConfigError where there is no content."""
    names = table.schema.names
    if config.format is DocumentFormat.chat:
        content = [name for name in dialogue.FIELDS if name in names]
        if not content:
            raise ConfigError(
                f"{file.path} has no column of a dialogue (it has {', '.join(names)}); needed are {dialogue.NEEDED}"
            )
    else:
        content = [config.text_field]
        if config.text_field not in names:
            raise ConfigError(
                f"{file.path} has no column {config.text_field!r} (it has {', '.join(names)}); set text_field"
            )
        if not is_text(kind := kind_of(table.schema, config.text_field)):
            raise ConfigError(
                f"{file.path} has {kind} in the column {config.text_field!r}, not text; set text_field"
            )
    more = name_columns(table.schema, ("id", "source", "license", "language"))
    return list(dict.fromkeys((*content, *more)))


def _document(
    file: InputFile, record: dict[str, Any], number: int, config: PrepareConfig, position_bytes: int
) -> Document | Rejected:
    where = f"{file.path}:{number}"
    try:
        if config.format is DocumentFormat.chat:
            messages = dialogue.parse(record)
            if not dialogue.has_answer(messages):
                return Rejected("no_answer", where, position_bytes, is_error=False)
            text = dialogue.dump(messages)
        else:
            text = _text_of(record, config.text_field)
    except ValueError as error:
        return Rejected("bad_record", f"{where} {error}", position_bytes, is_error=True)
    given = {
        key: _readable(value)
        for key in ("source", "license", "language")
        if isinstance(value := record.get(key), str)
    }
    own_id = record.get("id")
    is_id = isinstance(own_id, str | int) and not isinstance(own_id, bool) and own_id != ""
    return Document(
        id=_readable(str(own_id)) if is_id else f"{file.name}:{number}",
        source=given.get("source") or file.source,
        license=given.get("license") or file.license,
        text=text,
        position_bytes=position_bytes,
        language=given.get("language", ""),
    )


def _text_of(record: dict[str, Any], text_field: str) -> str:
    """The text of a record. Raises ValueError, whose text says what is wrong with it."""
    text = record.get(text_field)
    if isinstance(text, str):
        return text
    if text_field in record:
        raise ValueError(f"has {type(text).__name__} in the field {text_field!r}, not text")
    names = ", ".join(map(str, list(record)[:8])) or "none"
    raise ValueError(f"has no field {text_field!r} (its fields: {names}); set text_field")
