"""A document on its way through the stages of curation, and the interface of a stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

ENGLISH, CHINESE, CHINESE_TRADITIONAL, CODE, UNKNOWN = "en", "zh", "zh-hant", "code", "und"
"""Languages with rules of their own; all others are ISO 639-1 codes. `zh` is simplified Chinese."""

Signal = str | int | float


@dataclass(slots=True)
class Record:
    """One document. Stages change its text, add to its signals, and say why it is dropped."""

    id: str
    """The id that the input states, or else the file and the place in it."""
    text: str
    """The text, as the stages so far have left it."""
    source: str
    """Name of the source that the document belongs to."""
    language: str = UNKNOWN
    """The language code that the language stage detected."""
    url: str | None = None
    """Address of the document, where the input gives one."""
    license: str | None = None
    """License of the document, where the input gives one."""
    signals: dict[str, Signal] = field(default_factory=dict)
    """Measurements of the stages, named `stage.signal`; written to the output by stages that annotate."""
    counts: dict[str, int] = field(default_factory=dict)
    """Number of changes to the text, named `stage.what`: replaced emails, removed lines."""

    def count(self, name: str, n: int = 1) -> None:
        """Add `n` to a count; 0 leaves no entry."""
        if n:
            self.counts[name] = self.counts.get(name, 0) + n


class CurationStage(Protocol):
    """One step of curation, built from its part of the configuration. Its results are the same on every machine.

    One object is made per process. Large data, such as a model file, is loaded at the first document.
    """

    name: str
    """Name of the stage in the configuration; the names of its signals and counts begin with it."""

    def process(self, record: Record) -> str | None:
        """Change the record in place. Returns the reason for dropping it (a few words in snake_case), or None."""
