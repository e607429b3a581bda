"""Drops sexual spam, hate and scams, by word lists, lists of blocked addresses, and the user's own classifier.

A listed word is a sign, not a proof: an encyclopedia names what it describes. So a document is dropped for the density
of listed words or for the number of different ones, never for a single mention.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data_tools.record import CHINESE, CHINESE_TRADITIONAL, CODE, UNKNOWN, Record
from data_tools.stages.decontamination.canonical import LOOK_ALIKES
from data_tools.text import UNSPACED, WORD, WORD_END, WORD_START
from pretrain.config.texts import PathText
from pretrain.errors import ConfigError
from pretrain.files import read_lines

_SHIPPED = Path(__file__).parent / "word_lists"
_LISTED_ENTRIES = 10
# Scripts without spaces, in which an entry is found anywhere and shares count characters.
_UNSPACED = re.compile(rf"[{UNSPACED}]")
_WORD = re.compile(rf"[{WORD}]")
# Letters of other scripts among Latin ones, as in `сasino` with a Cyrillic first letter.
_MIXED = re.compile(r"[a-z][\u0370-\u04ff]|[\u0370-\u04ff][a-z]")
_MIXED_WORD = re.compile(r"[a-z\u0370-\u04ff]+")
_EDGES = (r"\b", WORD_START, WORD_END)


class HarmMode(Enum):
    drop = "drop"
    """Documents that a rule catches are dropped."""
    annotate = "annotate"
    """Such documents are kept, with the reason in the signal `harm.reason`."""


@dataclass(kw_only=True, slots=True)
class HarmConfig:
    """Which documents are dropped for their content or their address."""

    mode: HarmMode = HarmMode.drop
    word_lists: dict[str, PathText] = field(default_factory=dict)
    """File of words for each language (UTF-8, an entry per line, # comments). Other languages use the list that comes
    with data_tools (en, zh); an empty name switches a language off."""
    max_share: float = 0.02
    """Largest fraction of the words (for Chinese, of the characters) that may belong to listed entries."""
    max_entries: int = 4
    """Largest number of different entries in a document, however long it is."""
    blocked_domains: list[PathText] = field(default_factory=list)
    """Files of host names, one per line; their subdomains are blocked too."""
    blocked_url_parts: list[PathText] = field(default_factory=list)
    """Files of parts of addresses, one per line; case does not count."""
    classifier: PathText | None = None
    """A fastText model file; null: none."""
    classifier_label: str = "__label__harmful"
    """Label whose probability counts."""
    classifier_threshold: float = 0.5
    """Smallest probability (0 to 1) at which a document is dropped."""

    def __post_init__(self) -> None:
        for name in ("max_share", "classifier_threshold"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(
                    f"curation.harm.{name}={getattr(self, name)} is outside 0 to 1 (0 excluded)"
                )
        if self.max_entries < 1:
            raise ConfigError(f"curation.harm.max_entries={self.max_entries} must be 1 or more")


class HarmStage:
    """Drops documents as `blocked_url`, `word_list` or `classifier`, checked in this order.

    Signals: `harm.entries` (matched entries, comma-separated, the most frequent first), `harm.share`,
    `harm.classifier`; where nothing is dropped, `harm.reason`.
    """

    name = "harm"

    def __init__(self, config: HarmConfig) -> None:
        self._config = config
        self._words: dict[str, re.Pattern[str]] | None = None
        self._domains: set[str] = set()
        self._url_parts: re.Pattern[str] | None = None
        self._model: Any = None

    def process(self, record: Record) -> str | None:
        if self._words is None:
            self._load()
        reason = None
        if self._blocked(record.url):
            reason = "blocked_url"
        elif self._has_too_many_words(record):
            reason = "word_list"
        elif self._model is not None:
            probability = self._probability(record.text)
            record.signals["harm.classifier"] = probability
            if probability >= self._config.classifier_threshold:
                reason = "classifier"
        if reason and self._config.mode is HarmMode.annotate:
            record.signals["harm.reason"] = reason
            return None
        return reason

    def matches(self, record: Record) -> list[str]:
        """Each occurrence of a listed entry, as it is written in the text, in lower case."""
        if self._words is None:
            self._load()
        assert self._words is not None
        if record.language == CODE:
            return []
        language = record.language
        if language == CHINESE_TRADITIONAL and language not in self._words:
            language = CHINESE
        # if no language was detected, every list is tried
        patterns = self._words.values() if language == UNKNOWN else [self._words.get(language)]
        text = record.text.lower()
        if not text.isascii() and _MIXED.search(text):
            text = _MIXED_WORD.sub(_with_latin, text)
        return [entry for pattern in patterns if pattern for entry in pattern.findall(text)]

    def _has_too_many_words(self, record: Record) -> bool:
        entries = self.matches(record)
        if not entries:
            return False
        counts = Counter(entries)
        different = sorted(counts, key=lambda entry: (-counts[entry], entry))
        unspaced = sum(bool(_UNSPACED.search(entry)) for entry in entries) * 2 > len(entries)
        if unspaced:
            share = sum(map(len, entries)) / max(1, sum(map(len, record.text.split())))
        else:
            share = sum(len(entry.split()) for entry in entries) / max(1, len(record.text.split()))
        record.signals["harm.entries"] = ", ".join(different[:_LISTED_ENTRIES])
        record.signals["harm.share"] = round(share, 6)
        dense = len(entries) > 1 and share > self._config.max_share
        return dense or len(different) > self._config.max_entries

    def _blocked(self, url: str | None) -> bool:
        if not url:
            return False
        if self._url_parts and self._url_parts.search(url.lower()):
            return True
        if not self._domains:
            return False
        labels = host_of(url).split(".")
        return any(".".join(labels[at:]) in self._domains for at in range(len(labels)))

    def _probability(self, text: str) -> float:
        # the wrapped model: fasttext's own predict() fails with numpy 2
        found = self._model.f.predict(" ".join(text.split()) + "\n", -1, 0.0, "strict")
        return next((min(1.0, float(p)) for p, label in found if label == self._config.classifier_label), 0.0)

    def _load(self) -> None:
        config = self._config
        files = {path.stem: str(path) for path in sorted(_SHIPPED.glob("*.txt"))} | dict(config.word_lists)
        self._domains = {host_of(entry) for path in config.blocked_domains for entry in read_list(path)}
        self._url_parts = entry_pattern(
            (entry for path in config.blocked_url_parts for entry in read_list(path)), whole_words=False
        )
        if config.classifier:
            # imported here, so that users without a classifier need no fasttext
            import fasttext

            if not Path(config.classifier).is_file():
                raise ConfigError(f"curation.harm.classifier={config.classifier} is no file")
            self._model = fasttext.load_model(config.classifier)
            if config.classifier_label not in self._model.get_labels():
                raise ConfigError(
                    f"curation.harm.classifier_label={config.classifier_label} is no label of {config.classifier}"
                )
        self._words = {
            language: pattern
            for language, path in sorted(files.items())
            if path and (pattern := entry_pattern(read_list(path)))
        }


def _with_latin(word: re.Match[str]) -> str:
    """A word with the Latin letters that its letters look like, where it has Latin ones too; others stay."""
    return word[0].translate(LOOK_ALIKES) if _MIXED.search(word[0]) else word[0]


def read_list(path: str) -> list[str]:
    """Entries of a list in lower case: one per line, comments after #, single spaces. Raises ConfigError."""
    try:
        lines = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the list {path} of curation.harm cannot be read: {error}") from error
    entries = [" ".join(line.split("#")[0].lower().split()) for line in lines]
    return [entry for entry in entries if entry]


def host_of(url: str) -> str:
    """The host of an address, which may lack a scheme, in lower case and as ASCII; empty where there is none."""
    try:
        host = urlsplit(url if "//" in url else f"//{url}").hostname or ""
        return host.rstrip(".").encode("idna").decode().lower()
    except ValueError:  # UnicodeError is one
        return ""


def entry_pattern(entries: Iterable[str], *, whole_words: bool = True) -> re.Pattern[str] | None:
    """One pattern for all entries, the longest first. White space in an entry matches any white space.

    Entries are folded into a prefix tree, so that the cost of a search does not grow with their number.
    """
    tree: dict[str, Any] = {}
    for entry in entries:
        bounded = whole_words and not _UNSPACED.search(entry)
        # no mark stands beside a letter of ASCII in NFC, but for rare languages, and `\b` is quicker
        before, after = (
            r"\b" if entry[end].isascii() else edge for end, edge in ((0, WORD_START), (-1, WORD_END))
        )
        before = before if bounded and _WORD.match(entry[0]) else ""
        after = after if bounded and _WORD.match(entry[-1]) else ""
        node = tree
        for piece in [before, *entry, after]:
            if piece:
                node = node.setdefault(
                    r"\s+" if piece == " " else piece if piece in _EDGES else re.escape(piece),
                    {},
                )
        node[""] = {}
    return re.compile(_alternatives(tree)) if tree else None


def _alternatives(node: dict[str, Any]) -> str:
    """A prefix tree as a regular expression; chains without a fork are written as text, so that nesting stays low."""
    branches = []
    for piece in sorted(node, key=lambda piece: (piece == "", piece)):
        text, below = piece, node[piece]
        while len(below) == 1 and "" not in below:
            ((piece, below),) = below.items()
            text += piece
        branches.append(text + (_alternatives(below) if below and set(below) != {""} else ""))
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
