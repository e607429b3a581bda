"""Reads the texts of evaluation sets, which must not be in a corpus."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from data_tools.reading.bounded import Bounds, lines, unpacked
from data_tools.reading.listing import FORMATS, suffix_of
from data_tools.reading.reader import Entry, NoTextError, Span, entries
from pretrain.errors import ConfigError
from pretrain.printing import print_error
from pretrain.remote import open_file

KEY = "curation.decontaminate.files"
_WITH_FIELDS = ("jsonl", "json", "csv", "parquet", "arrow")


def read_items(path: str, fields: list[str]) -> Iterator[list[str]]:
    """The texts of each item of an evaluation file. Raises ConfigError.

    Files of JSON, CSV, Parquet and Arrow have an item per record, all others an item per line.
    """
    kind = FORMATS.get(suffix_of(path), "text")
    try:
        with open_file(KEY, path) as raw:
            if kind not in _WITH_FIELDS:
                yield from _items_of_lines(raw, path)
                return
            n_items = n_without = 0
            for entry in entries(raw, Span(path, kind, Bounds(), lambda schema: _columns(schema, fields))):
                texts = _texts_of(entry, fields)
                n_items += 1
                if any(texts):
                    yield texts
                else:
                    n_without += 1
            if 0 < n_without < n_items:
                what = (
                    f"{path}: {n_without:,} of {n_items:,} items have none of the fields {', '.join(fields)}"
                )
                print_error("not looked for", what)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{KEY}: {path} cannot be read: {error}") from error


def _columns(schema: Any, fields: list[str]) -> list[str]:
    found = [name for name in fields if name in schema.names]
    if not found:
        raise NoTextError(
            f"it has none of the columns {', '.join(fields)} (it has {', '.join(schema.names[:8])})"
        )
    return found


def _texts_of(entry: Entry, fields: list[str]) -> list[str]:
    """The texts of an item. Raises ValueError for a bad one, since a set that is not whole would let text pass."""
    if entry.is_break:
        raise ValueError(
            entry.problem.removeprefix("cannot be read").removeprefix(" from here on").removeprefix(": ")
        )
    if entry.problem:
        raise ValueError(f"item {entry.number} {entry.problem}")
    return [text for key in fields for text in _strings(entry.fields.get(key))]


def _items_of_lines(raw: Any, path: str) -> Iterator[list[str]]:
    bounds = Bounds()
    for line in lines(unpacked(raw, path, bounds), bounds.record_bytes):
        if line.content is None:
            raise ValueError(f"line {line.number} has more than {bounds.record_bytes} bytes")
        items = re.split("[\r\n]", line.content.decode("utf-8-sig"))
        yield from ([item.strip()] for item in items if item.strip())


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
