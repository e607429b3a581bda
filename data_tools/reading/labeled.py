"""Reads texts and the labels beside them, as a preparation of labeled documents does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from data_tools.config import DocumentFormat, LabelsConfig, PrepareConfig
from data_tools.reading.sources import Documents, find_files, read_documents
from data_tools.text import clean
from pretrain.errors import ConfigError

_MAX_CHARS = 1 << 40  # texts of any length are read


class LabeledText(NamedTuple):
    """A text and its class."""

    text: str
    """The text after cleaning."""
    label: str
    """The name of its class."""


def labeled_texts(
    entry: str, classes: Sequence[str], *, text_field: str, label_field: str
) -> Iterator[LabeledText]:
    """The texts of a file or folder that are not blank. Raises ConfigError for a record without a text or without one
    of the `classes`, naming its file and line."""
    options = PrepareConfig(
        input=[entry],
        output="",
        format=DocumentFormat.labeled,
        text_field=text_field,
        label_field=label_field,
        labels=LabelsConfig(classes=list(classes)),
        max_chars=_MAX_CHARS,
    )
    for file in find_files(options):
        for found in read_documents(file, options):
            if not isinstance(found, Documents):
                raise ConfigError(f"input={entry}: {found.where} ({found.reason})")
            for raw, label in zip(found.texts, found.labels, strict=True):
                if text := clean(raw):
                    yield LabeledText(text, label)
