"""Reads the texts of evaluation sets, which must not be in a corpus, from files in the layouts in which they come.

A set is a file, a folder, or the YAML file of an lm-eval task that names local files. Folders are those of OpenCompass
(`mmlu/test/*.csv`, `ceval/val/*.csv`, `BBH/data/*.json`), of Hugging Face datasets (Parquet, Arrow) and of anything
else that holds JSON, JSON lines, CSV or Parquet. An item is a JSON object, or a row of a table, that has one of the
fields; it may lie deep in a JSON file. A CSV file without a header has no fields, so all of its columns are read.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from data_tools.reading.bounded import Bounds, lines, unpacked
from data_tools.reading.listing import FORMATS, suffix_of
from data_tools.reading.reader import NoTextError, Span, entries
from data_tools.reading.spanning import csv_rows
from pretrain.errors import ConfigError
from pretrain.printing import print_error
from pretrain.remote import is_url, open_file

KEY = "curation.decontaminate.files"
FIELDS = (
    "question text prompt problem input instruction query stem sentence goal ctx "  # what is asked
    "choices options endings A B C D E sol1 sol2 option1 option2 mc1_targets mc2_targets "
    "answer answers target targets output solution canonical_solution code completion "
    "best_answer correct_answers incorrect_answers explanation rationale"
).split()
"""Fields that common benchmarks name their texts by. Passages that a question is about are left out on purpose: they
are copies of encyclopedias and news."""

_LINES, _JSON, _TABLES, _COLUMNS = (".jsonl", ".ndjson"), (".json",), (".csv", ".tsv"), (".parquet", ".arrow")
_TASKS = (".yaml", ".yml")
_PACKED = (".gz", ".zst", ".xz", ".bz2")
# Files of Hugging Face datasets that describe the others.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_TRAINING = re.compile(r"(?:^|[/_.-])train(?:[/_.-]|$)")
_PLACEHOLDER = re.compile(r"{{-?\s*(\w+)")
_MOST_INCLUDES = 8


class EvaluationFile(NamedTuple):
    """One file of an evaluation set."""

    path: str
    fields: list[str]
    """Fields of an item whose strings are looked for, also those inside lists and objects."""


def set_name(entry: str) -> str:
    """The name of a set: that of its file or folder, up to the first dot."""
    return entry.rstrip("/").rsplit("/", 1)[-1].split(".")[0]


def evaluation_files(entry: str, fields: list[str]) -> list[EvaluationFile]:
    """The files of an entry of `curation.decontaminate.files`, in order. Raises ConfigError.

    Of a folder, files for training are left out where there are others.
    """
    if entry.endswith(_TASKS):
        return _files_of_task(entry, fields)
    if is_url(entry) or not os.path.isdir(entry):
        return [EvaluationFile(entry, fields)]
    found = []
    for folder, folders, names in os.walk(entry):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            is_data = _suffix(name) in (*_LINES, *_JSON, *_TABLES, *_COLUMNS) and not name.startswith(".")
            if is_data and name not in _DESCRIPTIONS:
                found.append(os.path.join(folder, name))
    tests = [path for path in found if not _TRAINING.search(os.path.relpath(path, entry))]
    if not found:
        known = ", ".join((*_LINES, *_JSON, *_TABLES, *_COLUMNS))
        raise ConfigError(f"{KEY}: the folder {entry} has no file of an evaluation set; known are {known}")
    return [EvaluationFile(path, fields) for path in tests or found]


def read_items(path: str, fields: list[str]) -> Iterator[list[str]]:
    """The texts of each item of one file. Raises ConfigError."""
    bounds, suffix = Bounds(), _suffix(path)
    try:
        with open_file(KEY, path) as raw:
            if suffix in (*_LINES, *_JSON, *_COLUMNS):
                span = Span(path, FORMATS[suffix_of(path)], bounds, lambda schema: _columns(schema, fields))
                yield from _items_of_records(raw, span, fields)
                return
            file = unpacked(raw, path, bounds)
            if suffix in _TABLES:
                yield from _items_of_table(file, suffix, fields, bounds)
                return
            for content in _lines(file, bounds):
                items = re.split("[\r\n]", content.decode("utf-8-sig"))
                yield from ([item.strip()] for item in items if item.strip())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{KEY}: {path} cannot be read: {error}") from error


def _items_of_records(raw: IO[bytes], span: Span, fields: list[str]) -> Iterator[list[str]]:
    """The texts of the items in records. Raises ValueError for a bad one: a part of a set would let text pass."""
    n_records = n_without = 0
    for entry in entries(raw, span):
        if entry.is_break:
            reason = entry.problem.removeprefix("cannot be read").removeprefix(" from here on")
            raise ValueError(reason.removeprefix(": "))
        if entry.problem:
            raise ValueError(f"item {entry.number} {entry.problem}")
        found = list(_items(entry.fields, fields))
        n_records, n_without = n_records + 1, n_without + (not found)
        yield from found
    if 0 < n_without < n_records:
        what = (
            f"{span.path}: {n_without:,} of {n_records:,} items have none of the fields {', '.join(fields)}"
        )
        print_error("not looked for", what)


def _columns(schema: Any, fields: list[str]) -> list[str]:
    """The columns of a table that are fields of an item."""
    known = {field.casefold() for field in fields}
    found = [name for name in schema.names if name.casefold() in known]
    if not found:
        has = ", ".join(schema.names[:8])
        raise NoTextError(
            f"it has none of the columns {', '.join(fields)} (it has {has}); set decontaminate.fields"
        )
    return found


def _suffix(path: str) -> str:
    for packed in _PACKED:
        path = path.removesuffix(packed)
    return os.path.splitext(path)[1].lower()


def _lines(file: IO[bytes], bounds: Bounds) -> Iterator[bytes]:
    for line in lines(file, bounds.record_bytes):
        if line.content is None:
            raise ValueError(f"line {line.number} has more than {bounds.record_bytes} bytes")
        yield line.content


def _items(value: Any, fields: list[str]) -> Iterator[list[str]]:
    """The texts of all objects that have one of the fields, from the outside to the inside."""
    if isinstance(value, list):
        for part in value:
            yield from _items(part, fields)
    elif isinstance(value, dict):
        if texts := _texts(value, fields):
            yield texts
        else:
            for part in value.values():
                yield from _items(part, fields)


def _texts(item: dict[str, Any], fields: list[str]) -> list[str]:
    """The strings in the fields of an item, in the order of the fields. The case of names does not matter."""
    by_name = {name.casefold(): value for name, value in item.items() if isinstance(name, str)}
    found = (text for field in fields for text in _strings(by_name.get(field.casefold())))
    return [text for text in found if text.strip()]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _rows(file: IO[bytes], delimiter: str, bounds: Bounds) -> Iterator[list[str]]:
    """The rows of a table. Raises ValueError for a bad one: a part of a set would let text pass."""
    for row in csv_rows(file, bounds.record_bytes, delimiter):
        if row.problem:
            raise ValueError(f"the row at byte {row.begin:,} {row.problem}")
        yield row.values


def _items_of_table(file: IO[bytes], suffix: str, fields: list[str], bounds: Bounds) -> Iterator[list[str]]:
    rows = _rows(file, "\t" if suffix == ".tsv" else ",", bounds)
    first = next(rows, [])
    # MMLU has no header, and the letter of the answer is in its rows.
    known = {field.casefold() for field in fields if len(field) > 1}
    if not known.intersection(name.strip().casefold() for name in first):
        if texts_of_row := [cell for cell in first if cell.strip()]:
            yield texts_of_row
        for row in rows:
            yield [cell for cell in row if cell.strip()]
        return
    names = [name.strip() for name in first]
    for row in rows:
        if found := _texts(dict(zip(names, row, strict=False)), fields):
            yield found


# ---- tasks of lm-eval ------------------------------------------------------------------------------------------------


def _files_of_task(path: str, fields: list[str]) -> list[EvaluationFile]:
    """The local files that the YAML file of an lm-eval task names, and the fields of its templates."""
    task = _task(path, _MOST_INCLUDES)
    named = task.get("dataset_kwargs") or {}
    files = named.get("data_files", named.get("data_dir")) if isinstance(named, dict) else None
    if files is None:
        files = task.get("dataset_path")
    if isinstance(files, dict):
        files = [part for split, part in files.items() if split != "train"] or list(files.values())
    listed = [name for part in (files if isinstance(files, list) else [files]) for name in _listed(part)]
    templates = [task.get(key) for key in ("doc_to_text", "doc_to_choice", "doc_to_target")]
    used = [name for text in templates if isinstance(text, str) for name in _names_in(text)]
    found = []
    for name in listed:
        places = [os.path.join(os.path.dirname(path), name), name]
        place = next((place for place in places if os.path.exists(place)), None)
        if place is None:
            raise ConfigError(
                f"{KEY}: the task {path} names {name}, which is no local file or folder; download the dataset and give "
                "its folder instead"
            )
        found += evaluation_files(place, list(dict.fromkeys(used)) or fields)
    if not found:
        raise ConfigError(
            f"{KEY}: the task {path} names no dataset in dataset_kwargs.data_files or dataset_path"
        )
    return found


def _listed(value: Any) -> list[str]:
    return [name for name in (value if isinstance(value, list) else [value]) if isinstance(name, str)]


def _names_in(template: str) -> list[str]:
    """The fields that a template of a task uses; a template of one word is the field itself."""
    return _PLACEHOLDER.findall(template) or ([template] if template.isidentifier() else [])


def _task(path: str, n_includes: int) -> dict[str, Any]:
    """The content of a task file over that of the file that it includes. Functions that it names are left out."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads plain values, and takes `!function module.name` for nothing."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    try:
        content = Path(path).read_bytes()
        task = Loader(io.BytesIO(content)).get_single_data()
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{KEY}: the task {path} cannot be read: {error}") from error
    if not isinstance(task, dict):
        raise ConfigError(f"{KEY}: the task {path} is no YAML mapping")
    included = task.get("include")
    if isinstance(included, str) and n_includes:
        task = _task(os.path.join(os.path.dirname(path), included), n_includes - 1) | task
    return task
