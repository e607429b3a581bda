"""Finds the files that a preparation reads, and yields the documents of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from data_tools.config import DocumentFormat, PrepareConfig
from data_tools.reading import dialogue
from data_tools.reading.bounded import Bounds
from data_tools.reading.columns.columnar import name_columns, text_problem
from data_tools.reading.encodings import known_encoding
from data_tools.reading.listing import (
    FORMATS,
    FoundFile,
    LeftOut,
    OnLeftOut,
    expand_ranges,
    files_in,
    is_url,
    print_left_out,
    reason_of,
    shard_source,
    suffix_of,
)
from data_tools.reading.python_text import python_files
from data_tools.reading.reader import Entry, NoTextError, Run, Span, runs
from pretrain.errors import ConfigError
from pretrain.files import open_regular
from pretrain.stored import is_printable_line

_NO_FIELDS = {"text", "warc"}
PYTHON = "python"
MAX_LABEL_CHARS = 100
UTF8_BYTES_PER_CHAR = 4
# Documents that are returned together: a memory of little more than the longest one takes.
_GROUP_DOCUMENTS, _GROUP_CHARS = 256, 1 << 18


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
    is_named: bool = True
    """Whether the user named the file or its folder. The files of the input `python` are not: some are broken on
    purpose, for tests of Python's own reader, so those that are no text are dropped as if by a rule."""


@dataclass(slots=True)
class Documents:
    """Texts that follow one another in a file, before cleaning. They are columns, because short texts take less time
    than an object for each. Their number is bounded, and so is their size but for the last one."""

    ids: list[str] = field(default_factory=list)
    sources: list[tuple[str, str]] = field(default_factory=list)
    """Name of the source, and license, of each."""
    texts: list[str] = field(default_factory=list)
    """The texts; for dialogues, the results of `dialogue.dump`."""
    languages: list[str] = field(default_factory=list)
    """Language codes that data_tools.curate has written; empty where they are not known."""
    labels: list[str] = field(default_factory=list)
    """The classes of labeled documents; empty texts for others."""
    position_bytes: int = 0
    """Number of bytes of the file that have been read so far."""
    n_chars: int = 0
    """Length of the texts that were added one by one."""

    def __len__(self) -> int:
        return len(self.texts)

    def after(self, n: int) -> Documents:
        """The documents without the first `n`."""
        columns = (self.ids, self.sources, self.texts, self.languages, self.labels)
        return Documents(*(column[n:] for column in columns), self.position_bytes)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that gives no document, or a file, or a part of one, that cannot be read."""

    reason: str
    """A word for the funnel."""
    where: str
    """The path of the file and the place in it, and what is wrong there."""
    position_bytes: int
    """Number of bytes of the file that have been read so far."""
    is_error: bool
    """Whether the record is bad, rather than dropped by a rule."""
    file: str = ""
    """For a file, or a part of one: its name, and the place in it. Empty for a record."""
    problem: str = ""
    """For a file, or a part of one: what is wrong with it. It continues a sentence that begins with `file`."""
    lost: int = 1
    """The number of documents that are lost, as far as that is known."""
    lost_bytes: int = 0
    """Where it is not known: the number of bytes of the file that hold these documents."""


def find_files(config: PrepareConfig, on_left_out: OnLeftOut = print_left_out) -> list[InputFile]:
    """The files that `config.input` names, in a fixed order. Raises ConfigError."""
    known_encoding("encoding", config.encoding)
    files, left_out = list[InputFile](), list[LeftOut]()
    labels: dict[str, int] = {}
    needs_fields = config.format is not DocumentFormat.text
    formats = {*FORMATS.values()} - (_NO_FIELDS if needs_fields else set())
    for entry in expand_ranges(config.input):
        if entry == PYTHON and needs_fields:
            what = "dialogues" if config.format is DocumentFormat.chat else "labels"
            raise ConfigError(
                f"input=[{PYTHON}] holds no {what}; give files for format={config.format.value}"
            )
        if entry == PYTHON:
            limit = config.max_chars * UTF8_BYTES_PER_CHAR
            files += [
                InputFile(f.name, f.path, f.source, f.license, f.size_bytes, 0, is_named=False)
                for f in python_files(config.python_max_bytes, limit)
            ]
            continue
        if is_url(entry):
            raise ConfigError(
                f"input={entry} is a URL, which only data_tools.curate reads; download it, or curate it"
            )
        root = Path(entry).expanduser()
        label = root.resolve().name or "input"
        labels[label] = labels.get(label, 0) + 1
        if labels[label] > 1:  # two inputs have this name, but the ids of their documents must differ
            label = f"{label}~{labels[label]}"
        found, others = files_in(str(root), formats, config.ignore)
        # Existing corpora list their sources in this order, folder by folder, so it must stay.
        found = sorted(found, key=lambda file: Path(file.path))
        files += [_input_file(file, label, config.license) for file in found]
        left_out += [file._replace(name=_readable(f"{label}/{file.name}")) for file in others]
    on_left_out(left_out)
    return files


def _input_file(file: FoundFile, label: str, license: str) -> InputFile:
    path = Path(file.path)
    name = _readable(f"{label}/{file.relative}" if file.relative else label)
    if file.suffix == ".tar":  # shards of one dataset are one source
        source = shard_source(file.path)
    elif file.relative and path.name.endswith(file.suffix) and FORMATS[file.suffix] == "text":
        source = label  # each text file of a folder is one document
    else:
        source = path.name.removesuffix(file.suffix)
    return InputFile(name, path, _readable(source), license, file.size_bytes or 0, file.changed)


def _readable(name: str) -> str:
    """A name with bytes that are not valid UTF-8 replaced."""
    return name if name.isascii() else name.encode("utf-8", "replace").decode()


def read_documents(file: InputFile, config: PrepareConfig) -> Iterator[Documents | Rejected]:
    """Every record of a file, and what cannot be read of it. Raises ConfigError where a package is missing."""
    for item in _read(file, config):
        if isinstance(item, Rejected) and item.is_error and not file.is_named:
            yield Rejected("not_text", item.where, item.position_bytes, is_error=False)
        else:
            yield item


def _read(file: InputFile, config: PrepareConfig) -> Iterator[Documents | Rejected]:
    kind = FORMATS.get(suffix_of(file.path.name), "text")  # files of the input `python` have other suffixes
    most_bytes = config.max_chars * UTF8_BYTES_PER_CHAR if kind == "text" else config.max_record_bytes
    if kind == "text" and file.size_bytes > most_bytes and file.path.name.endswith((".txt", ".md")):
        yield Rejected("too_long", str(file.path), file.size_bytes, is_error=False)
        return
    encoding = known_encoding("encoding", config.encoding)
    columns = partial(_columns, config=config)
    span = Span(str(file.path), kind, Bounds(most_bytes), columns, encoding=encoding)
    try:
        raw = open_regular(file.path)
    except (ConfigError, OSError) as error:
        problem = f"cannot be read: {reason_of(error)}"
        where = f"{file.path} {problem}"
        yield Rejected("unread", where, 0, True, file.name, problem, lost_bytes=file.size_bytes)
        return
    with raw:
        waiting = Documents()
        for found in runs(raw, span):
            together = _of_run(file, found, config) if isinstance(found, Run) else None
            for entry in _one_by_one(found) if together is None else ():
                bad = (
                    _rejected(file, entry, kind, config)
                    if entry.problem
                    else _add(waiting, file, entry, config)
                )
                if waiting and (bad or len(waiting) == _GROUP_DOCUMENTS or waiting.n_chars >= _GROUP_CHARS):
                    yield waiting
                    waiting = Documents()
                if bad:
                    yield bad
            if together is not None:
                if waiting:
                    yield waiting
                    waiting = Documents()
                yield together
        if waiting:
            yield waiting


def _one_by_one(found: Entry | Run) -> Iterable[Entry]:
    return found.entries() if isinstance(found, Run) else (found,)


def _of_run(file: InputFile, run: Run, config: PrepareConfig) -> Documents | None:
    """The documents of records that were read together; None where one of them has no text, or they are dialogues or
    labeled."""
    texts = [record.get(config.text_field) for record in run.fields]
    if config.format is not DocumentFormat.text or set(map(type, texts)) != {str}:
        return None
    given = set[str]().union(*run.fields)
    sources, languages = [(file.source, file.license)] * len(texts), [""] * len(texts)
    if given & {"source", "license"}:
        sources = [_source_of(file, record) for record in run.fields]
    if "language" in given:
        languages = [_given(record, "language") for record in run.fields]
    own_ids = [record.get("id") for record in run.fields]
    if set(map(type, own_ids)) == {int}:
        ids = list(map(str, own_ids))
    else:
        pairs = zip(own_ids, run.lines, strict=True)
        ids = [_id_of(own_id) or f"{file.name}:{line.number}" for own_id, line in pairs]
    labels = [""] * len(texts)
    return Documents(ids, sources, cast("list[str]", texts), languages, labels, run.position_bytes)


def _rejected(file: InputFile, entry: Entry, kind: str, config: PrepareConfig) -> Rejected:
    place = "" if entry.is_file else f":{entry.number}"
    where = f"{file.path}{place} {entry.problem}"
    if entry.is_break or entry.lost_bytes:
        lost = (entry.lost, entry.lost_bytes)
        return Rejected(
            "unread", where, entry.position_bytes, True, f"{file.name}{place}", entry.problem, *lost
        )
    if kind == "text":  # a rule on documents, which the bound on the file stands for
        return Rejected("too_long", where, entry.position_bytes, is_error=False)
    allowed = f", and max_record_bytes={config.max_record_bytes} allows no more" if entry.is_too_large else ""
    return Rejected("bad_record", f"{where}{allowed}", entry.position_bytes, is_error=True)


def _columns(schema: Any, config: PrepareConfig) -> list[str]:
    """The columns of a table to read. Raises NoTextError if none of them holds text or dialogues, as required."""
    names = schema.names
    if config.format is DocumentFormat.chat:
        content = [name for name in dialogue.FIELDS if name in names]
        if not content:
            raise NoTextError(
                f"has no column of a dialogue (it has {', '.join(names)}); needed are {dialogue.NEEDED}"
            )
        # parse() refuses those of the second kind unless they are empty
        content += [name for name in (*dialogue.BESIDE, *dialogue.UNREAD) if name in names]
    else:
        content = [config.text_field]
        if problem := text_problem(schema, config.text_field):
            raise NoTextError(f"{problem}; set text_field")
        if config.format is DocumentFormat.labeled:
            if config.label_field not in names:
                raise NoTextError(
                    f"has no column {config.label_field!r} (it has {', '.join(names)}); set label_field"
                )
            content.append(config.label_field)
    more = name_columns(schema, ("id", "source", "license", "language"))
    return list(dict.fromkeys((*content, *more)))


def _add(waiting: Documents, file: InputFile, entry: Entry, config: PrepareConfig) -> Rejected | None:
    """Add the document of a record. Returns why it has none."""
    record = entry.fields
    try:
        if config.format is DocumentFormat.chat:
            found = dialogue.parse(record)
            if not dialogue.has_turn_of(found.messages, [role.value for role in config.chat.loss_roles]):
                where = f"{file.path}:{entry.number}"
                return Rejected("no_answer", where, entry.position_bytes, is_error=False)
            text = dialogue.dump(found)
        else:
            text = _text_of(record, config.text_field) if entry.text is None else entry.text
        is_labeled = config.format is DocumentFormat.labeled
        label = label_of(record, config.label_field, config.labels.classes) if is_labeled else ""
    except ValueError as error:
        where = f"{file.path}:{entry.number}"
        if entry.lost_bytes:
            lost = (entry.lost, entry.lost_bytes)
            place = f"{file.name}:{entry.number}"
            return Rejected(
                "unread", f"{where} {error}", entry.position_bytes, True, place, str(error), *lost
            )
        return Rejected("bad_record", f"{where} {error}", entry.position_bytes, is_error=True)
    waiting.ids.append(
        _id_of(record.get("id")) or (file.name if entry.is_file else f"{file.name}:{entry.number}")
    )
    waiting.sources.append(_source_of(file, record))
    waiting.texts.append(text)
    waiting.languages.append(_given(record, "language"))
    waiting.labels.append(label)
    waiting.n_chars += len(text)
    waiting.position_bytes = entry.position_bytes
    return None


def _id_of(value: object) -> str:
    """An id that a record states; empty where it is none."""
    if isinstance(value, str):
        return _readable(value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else ""


def _source_of(file: InputFile, record: dict[str, Any]) -> tuple[str, str]:
    return _given(record, "source") or file.source, _given(record, "license") or file.license


def _given(record: dict[str, Any], key: str) -> str:
    """What a record says under a key; empty where that is no text."""
    value = record.get(key)
    return _readable(value) if isinstance(value, str) else ""


def label_of(record: dict[str, Any], field: str, classes: Sequence[str]) -> str:
    """The label of a record, one of `classes` where there are any. Raises ValueError, whose message says what is wrong
    with the record."""
    label = record.get(field)
    if isinstance(label, bool) or not isinstance(label, str | int) or not is_printable_line(str(label)):
        if field in record:
            raise ValueError(
                f"has {str(label)[:60]!r} in the field {field!r}, which is no label: neither a word nor a whole number"
            )
        names = ", ".join(map(str, list(record)[:8])) or "none"
        raise ValueError(f"has no label in the field {field!r} (its fields: {names}); set label_field")
    name = str(label).strip()
    if not name or len(name) > MAX_LABEL_CHARS:
        raise ValueError(
            f"has a label of {len(name)} characters in the field {field!r}; allowed: 1 to {MAX_LABEL_CHARS}"
        )
    if classes and name not in classes:
        raise ValueError(f"has the label {name!r}, which is none of the classes {', '.join(classes)}")
    return name


def _text_of(record: dict[str, Any], text_field: str) -> str:
    """The text of a record. Raises ValueError, whose message says what is wrong with the record."""
    text = record.get(text_field)
    if isinstance(text, str):
        return text
    if text_field in record:
        raise ValueError(f"has {type(text).__name__} in the field {text_field!r}, not text")
    names = ", ".join(map(str, list(record)[:8])) or "none"
    raise ValueError(f"has no field {text_field!r} (its fields: {names}); set text_field")
