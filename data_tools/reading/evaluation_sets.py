"""Reads the texts of evaluation sets, which must not be in a corpus."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from data_tools.reading.bounded import Bounds, lines, unpacked
from pretrain.errors import ConfigError
from pretrain.remote import open_file


def read_items(path: str, fields: list[str]) -> Iterator[list[str]]:
    """The texts of each item of an evaluation file. Raises ConfigError."""
    name = path.removesuffix(".gz").removesuffix(".zst")
    bounds = Bounds()
    try:
        with open_file("curation.decontaminate.files", path) as raw:
            for line in lines(unpacked(raw, path, bounds), bounds.record_bytes):
                if line.content is None:
                    raise ValueError(f"line {line.number} has more than {bounds.record_bytes} bytes")
                if name.endswith((".jsonl", ".ndjson")):
                    item = line.json()
                    texts = [text for key in fields for text in _strings(item.get(key))]
                    if any(texts):
                        yield texts
                else:
                    items = re.split("[\r\n]", line.content.decode("utf-8-sig"))
                    yield from ([item.strip()] for item in items if item.strip())
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"curation.decontaminate.files: {path} cannot be read: {error}") from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
