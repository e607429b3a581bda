"""A document on its way through the stages of curation, and what a stage is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

ENGLISH, CHINESE, CHINESE_TRADITIONAL, CODE, UNKNOWN = "en", "zh", "zh-hant", "code", "und"
"""Languages that stages treat in their own way; others are ISO 639-1 codes. `zh` is simplified Chinese."""

Signal = str | int | float


@dataclass(slots=True)
class Record:
    """One document. Stages change its text, add to its signals, and say why it is dropped."""

    id: str
    text: str
    source: str
    language: str = UNKNOWN
    url: str | None = None
    license: str | None = None
    signals: dict[str, Signal] = field(default_factory=dict)
    """What stages measured, by name `stage.signal`; kept where the stage annotates."""
    counts: dict[str, int] = field(default_factory=dict)
    """What stages did within the text, by name `stage.what`: replaced emails, removed lines."""

    def count(self, name: str, n: int = 1) -> None:
        """Add to a count; nothing is recorded for 0."""
        if n:
            self.counts[name] = self.counts.get(name, 0) + n


class Stage(Protocol):
    """One step of curation. Made from its part of the configuration; the same result on every machine.

    An object is made once per process. What is large (a model file) is loaded at the first document.
    """

    name: str
    """As in the configuration, `stage`; its signals and counts begin with it."""

    def process(self, record: Record) -> str | None:
        """Change the record in place; the reason for dropping it (a few words in snake_case), or None."""
