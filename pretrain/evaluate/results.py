"""Files of results: a summary of one task, and a record of each item, from which two models can be compared."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.errors import ConfigError
from pretrain.evaluate.scores import Array, score_named, standard_error, value_of
from pretrain.files import read_capped, write_atomically
from pretrain.stored import Count, FileName, Line, Text, parse

if TYPE_CHECKING:  # it imports torch, which a comparison does not need
    from pretrain.evaluate.heldout import TokenDocument

FORMAT = 1
_MAX_BYTES = 1 << 30
_MAX_VALUES = 1 << 26
_OWN_VALUE = ("bleu", "chrf", "loss", "bits_per_byte", "gold_bits_per_byte")
"""Scores with several statistics that a single item has, too."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A score of all items."""

    value: float
    standard_error: float | None
    """Standard deviation over resampled items; None for a single item."""
    higher_is_better: bool


@dataclass(frozen=True, kw_only=True)
class ItemResult:
    """One item."""

    id: Text
    hash: Line
    prediction: Text = ""
    """The answer, or the name of the chosen label or text."""
    expected: list[Text] = field(default_factory=list)
    """The right answers."""
    scores: dict[str, float] = field(default_factory=dict)
    statistics: dict[str, list[float]] = field(default_factory=dict)
    """What a score of all items is computed from, where this is not the mean of the items' scores."""
    in_corpus: bool | None = None
    """Whether text of the item is in the training corpus; None where it was not looked for."""


@dataclass(frozen=True, kw_only=True)
class UnscoredItem:
    """An item without scores."""

    id: Text
    reason: Text


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """How many items share text with the training corpus."""

    corpus: Text
    items: Count
    """Items that were looked for; those with a few words only are not."""
    found: Count
    too_short: Count

    @property
    def share(self) -> float:
        """Share of the items that were looked for; NaN where there was none."""
        return self.found / self.items if self.items else math.nan


@dataclass(frozen=True, kw_only=True)
class Results:
    """The content of a file of results."""

    format: int
    task: FileName
    kind: Line
    task_sha256: Line
    """Hash of the task file; empty for held-out text."""
    run_dir: Text
    step: Count
    tokens_seen: Count
    precision: Line
    n_examples: Count
    chat: bool
    main: Line
    """Name of the score that stands for the task."""
    scores: dict[str, Scored]
    truncated: Count
    """Number of items whose beginning was cut off."""
    empty: Count
    """Number of empty answers."""
    unscored: list[UnscoredItem]
    items: list[ItemResult]
    overlap: Overlap | None = None
    by_label: dict[str, dict[str, float]] = field(default_factory=dict)
    """Precision, recall, F1 and number of items of each label."""
    confusion_matrix: list[list[int]] = field(default_factory=list)
    """Items by true label (rows) and predicted one (columns), in the order of `by_label`."""

    def statistics(self, name: str) -> Array:
        """The statistics [items, k] of a score."""
        return np.array([item.statistics.get(name) or [item.scores[name]] for item in self.items], np.float64)

    def write(self, path: Path) -> None:
        """Write the file; it is complete or not there at all. Raises OSError."""
        content = json.dumps(asdict(self), ensure_ascii=False, indent=1, allow_nan=False)
        write_atomically(path, content.encode("utf-8", "backslashreplace") + b"\n")


def read_results(path: Path) -> Results:
    """Read a file of results. Raises ConfigError."""
    try:
        content = read_capped(path, _MAX_BYTES)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    found = parse(Results, content, str(path), "a file of results of launch/eval.py", _MAX_VALUES)
    if found.format != FORMAT:
        raise ConfigError(
            f"{path} has the format {found.format}, and this program reads {FORMAT}; evaluate again"
        )
    for name in found.scores:
        widths = {len(item.statistics.get(name) or [None] * (name in item.scores)) for item in found.items}
        if len(widths) != 1 or widths == {0}:
            raise ConfigError(f"{path} lacks the {name} of an item; evaluate again")
    return found


def records(
    ids: Sequence[tuple[str, str]],
    statistics: Mapping[str, Array],
    predictions: Sequence[str],
    expected: Sequence[Sequence[str]],
    in_corpus: Sequence[bool | None] | None = None,
) -> list[ItemResult]:
    """The records of items, given as pairs of id and hash."""
    found = []
    for number, (own, digest) in enumerate(ids):
        rows = {name: rows[number] for name, rows in statistics.items()}
        of_item = {name: float(row[0]) for name, row in rows.items() if len(row) == 1}
        of_item |= {name: value_of(name, row[None]) for name, row in rows.items() if name in _OWN_VALUE}
        found.append(
            ItemResult(
                id=own,
                hash=digest,
                prediction=predictions[number],
                expected=list(expected[number]),
                scores=of_item,
                statistics={name: row.tolist() for name, row in rows.items() if len(row) > 1},
                in_corpus=None if in_corpus is None else in_corpus[number],
            )
        )
    return found


def hash_of(content: bytes) -> str:
    """The hash by which an item is known again."""
    return hashlib.sha256(content).hexdigest()[:16]


def document_result(
    document: TokenDocument, nll_sum: float, n_predicted: int, *, of_all_text: bool
) -> ItemResult:
    """The record of a document of held-out text."""
    statistics = {"loss": [nll_sum, float(n_predicted)]}
    text_bytes = document.text_bytes if document.is_target is None else document.target_bytes
    if of_all_text:
        statistics["bits_per_byte"] = [nll_sum / math.log(2), float(text_bytes)]
    digest = document.text_hash or hash_of(document.tokens.astype("<i8").tobytes())
    return ItemResult(
        id=f"{document.source}: {document.id}",
        hash=digest,
        scores={name: above / below for name, (above, below) in statistics.items() if below},
        statistics=statistics,
    )


def scored(statistics: Mapping[str, Array], seed: int = 0) -> dict[str, Scored]:
    """Every score of all items, with its noise."""
    found = {}
    for name, rows in statistics.items():
        error = standard_error(name, rows, seed)
        found[name] = Scored(
            value=value_of(name, rows),
            standard_error=None if math.isnan(error) else error,
            higher_is_better=score_named(name).higher_is_better,
        )
    return found


def as_json(results: Results) -> dict[str, Any]:
    """A summary without items, for the last line of output."""
    left_out = ("items", "unscored", "confusion_matrix", "by_label", "format")
    summary = {name: value for name, value in asdict(results).items() if name not in left_out}
    return summary | {"items": len(results.items), "unscored": len(results.unscored)}
