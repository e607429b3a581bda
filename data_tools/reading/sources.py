"""Finds the files that a preparation reads, and yields the documents of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.config import DocumentFormat, PrepareConfig
from data_tools.reading import dialogue
from data_tools.reading.bounded import BROKEN, Bounds
from data_tools.reading.columnar import name_columns
from data_tools.reading.python_text import python_files
from data_tools.reading.reader import (
    FORMATS,
    Entry,
    FoundFile,
    Span,
    entries,
    expand_ranges,
    files_in,
    read_whole,
    reason_of,
    shard_source,
    suffix_of,
    text_problem,
)
from pretrain.errors import ConfigError
from pretrain.files import open_regular

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt", ".md", ".tar")
"""Suffixes of the files that a preparation reads."""
PYTHON = "python"
UTF8_BYTES_PER_CHAR = 4


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file to read. `name` does not depend on where the input is stored, and begins each document's id."""

    name: str
    path: Path
    source: str
    license: str
    size_bytes: int
    version: int
    """A number that changes when the file changes."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text before cleaning."""

    id: str
    source: str
    license: str
    text: str
    """The text; for a dialogue, the result of `dialogue.dump`."""
    position_bytes: int
    """Number of bytes of the file that have been read so far."""
    language: str = ""
    """Language code that data_tools.curate has written; empty if it is not known."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that gives no document. `is_error` tells whether the record is bad, rather than dropped by a rule."""

    reason: str
    where: str
    position_bytes: int
    is_error: bool


def find_files(config: PrepareConfig) -> list[InputFile]:
    """The files that `config.input` names, in a fixed order. Raises ConfigError."""
    files: list[InputFile] = []
    labels: dict[str, int] = {}
    is_chat = config.format is DocumentFormat.chat
    suffixes = [suffix for suffix in SUFFIXES if not (is_chat and FORMATS[suffix] == "text")]
    for entry in expand_ranges(config.input):
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
        if labels[label] > 1:  # two inputs have this name, but the ids of their documents must differ
            label = f"{label}~{labels[label]}"
        found = files_in(str(root), suffixes, follow_links=False)
        # Existing corpora list their sources in this order, folder by folder, so it must stay.
        found = sorted(found, key=lambda file: Path(file.path))
        files += [_input_file(file, label, config.license) for file in found]
    return files


def _input_file(file: FoundFile, label: str, license: str) -> InputFile:
    path = Path(file.path)
    name = _readable(f"{label}/{file.relative}" if file.relative else label)
    if file.suffix == ".tar":  # shards of one dataset are one source
        source = shard_source(file.path)
    elif file.relative and path.suffix == file.suffix and FORMATS[file.suffix] == "text":
        source = label  # each text file of a folder is one document
    else:
        source = path.name.removesuffix(file.suffix)
    return InputFile(name, path, _readable(source), license, file.size_bytes or 0, file.changed)


def _readable(name: str) -> str:
    """A name with bytes that are not valid UTF-8 replaced."""
    return name.encode("utf-8", "replace").decode()


def read_documents(file: InputFile, config: PrepareConfig) -> Iterator[Document | Rejected]:
    """Every record of a file. Raises ConfigError where the file cannot be read, or only a part of it."""
    kind = FORMATS.get(suffix_of(file.path.name), "text")  # files of the input `python` have other suffixes
    try:
        if kind == "text":
            yield _read_text(file, config.max_chars)
            return
        bounds = Bounds(config.max_record_bytes)
        span = Span(str(file.path), kind, bounds, lambda schema: _columns(file, schema, config))
        with open_regular(file.path) as raw:
            for entry in entries(raw, span):
                where = f"{file.path}:{entry.number}"
                if entry.is_break:
                    raise ConfigError(f"{where} {entry.problem}")
                if entry.problem:
                    yield _bad_record(where, entry, config)
                else:
                    yield _document(file, entry, config)
    except ConfigError:
        raise
    except (*BROKEN, ValueError) as error:
        raise ConfigError(f"{file.path} cannot be read: {reason_of(error)}") from error


def _bad_record(where: str, entry: Entry, config: PrepareConfig) -> Rejected:
    most = config.max_record_bytes
    allowed = f", and max_record_bytes={most} allows no more" if entry.is_too_large else ""
    return Rejected("bad_record", f"{where} {entry.problem}{allowed}", entry.position_bytes, is_error=True)


def _read_text(file: InputFile, max_chars: int) -> Document | Rejected:
    most_bytes = max_chars * UTF8_BYTES_PER_CHAR
    if file.size_bytes > most_bytes:
        return Rejected("too_long", str(file.path), file.size_bytes, is_error=False)
    try:
        with open_regular(file.path) as raw:
            text = read_whole(raw, most_bytes).decode("utf-8")
    except UnicodeDecodeError:
        return Rejected("not_utf8", str(file.path), file.size_bytes, is_error=False)
    return Document(file.name, file.source, file.license, text, file.size_bytes)


def _columns(file: InputFile, schema: Any, config: PrepareConfig) -> list[str]:
    """The columns of a table to read. Raises ConfigError if none of them holds text or dialogues, as required."""
    names = schema.names
    if config.format is DocumentFormat.chat:
        content = [name for name in dialogue.FIELDS if name in names]
        if not content:
            raise ConfigError(
                f"{file.path} has no column of a dialogue (it has {', '.join(names)}); needed are {dialogue.NEEDED}"
            )
        content += [
            name for name in dialogue.UNREAD if name in names
        ]  # which parse() refuses unless they are empty
    else:
        content = [config.text_field]
        if problem := text_problem(schema, config.text_field):
            raise ConfigError(f"{file.path}: {problem}; set text_field")
    more = name_columns(schema, ("id", "source", "license", "language"))
    return list(dict.fromkeys((*content, *more)))


def _document(file: InputFile, entry: Entry, config: PrepareConfig) -> Document | Rejected:
    where, record = f"{file.path}:{entry.number}", entry.fields
    try:
        if config.format is DocumentFormat.chat:
            messages = dialogue.parse(record)
            if not dialogue.has_answer(messages):
                return Rejected("no_answer", where, entry.position_bytes, is_error=False)
            text = dialogue.dump(messages)
        else:
            text = _text_of(record, config.text_field) if entry.text is None else entry.text
    except ValueError as error:
        return Rejected("bad_record", f"{where} {error}", entry.position_bytes, is_error=True)
    given = {
        key: _readable(value)
        for key in ("source", "license", "language")
        if isinstance(value := record.get(key), str)
    }
    own_id = record.get("id")
    is_id = isinstance(own_id, str | int) and not isinstance(own_id, bool) and own_id != ""
    return Document(
        id=_readable(str(own_id)) if is_id else f"{file.name}:{entry.number}",
        source=given.get("source") or file.source,
        license=given.get("license") or file.license,
        text=text,
        position_bytes=entry.position_bytes,
        language=given.get("language", ""),
    )


def _text_of(record: dict[str, Any], text_field: str) -> str:
    """The text of a record. Raises ValueError, whose message says what is wrong with the record."""
    text = record.get(text_field)
    if isinstance(text, str):
        return text
    if text_field in record:
        raise ValueError(f"has {type(text).__name__} in the field {text_field!r}, not text")
    names = ", ".join(map(str, list(record)[:8])) or "none"
    raise ValueError(f"has no field {text_field!r} (its fields: {names}); set text_field")
