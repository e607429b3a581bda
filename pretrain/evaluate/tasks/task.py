"""Task files: what a model is asked, where the items are, and what is right. docs/evaluation.md has the format."""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np

from pretrain.errors import ConfigError
from pretrain.files import read_capped
from pretrain.stored import FileName, Ge, Le, Line, MaxLen, MinLen, Positive, Text, parse

_MAX_FILE_BYTES, _MAX_DATA_BYTES = 1 << 20, 1 << 30
_WHAT = "a task"
Fields = Annotated[list[Line], MinLen(1)]
Value = str | int | float | bool | None


class Kind(StrEnum):
    """What a model does with an item."""

    GENERATION = "generation"
    """It writes an answer, which is compared with references."""
    CLASSIFICATION = "classification"
    """It finds one of the labels the likeliest. All items have the same labels."""
    MULTIPLE_CHOICE = "multiple_choice"
    """It finds one of the item's choices the likeliest."""


class Metric(StrEnum):
    """How a written answer is compared with its references."""

    BLEU = "bleu"
    CHRF = "chrf"
    ROUGE = "rouge"
    EXACT_MATCH = "exact_match"
    F1 = "f1"


class Language(StrEnum):
    """How text is cut into the units that are counted: English into words, Chinese into characters."""

    EN = "en"
    ZH = "zh"


@dataclass(kw_only=True, slots=True)
class Task:
    """The keys of a task file."""

    kind: Kind
    data: Line | Fields
    """Files of items in JSON Lines; a relative path begins at the task file's folder."""
    prompt: Text
    """Template of the prompt: `{name}` is replaced by the item's field `name`, `{{` and `}}` are braces."""
    name: FileName = ""
    """Name of the task in results; by default that of its file."""
    id: Line = "id"
    """Field that identifies an item. An item without it is called by its file and line."""
    where: dict[str, Value | list[Value]] = field(default_factory=dict)
    """Only items with these values of these fields are used; a list allows several values."""
    language: Language = Language.EN
    examples: Line | Fields | None = None
    """Files of solved items to show before each prompt, in JSON Lines."""
    examples_where: dict[str, Value | list[Value]] = field(default_factory=dict)
    """As `where`, for `examples`."""
    n_examples: Annotated[int, Ge(0), Le(1000)] = 0
    """Number of solved items before each prompt."""
    seed: Annotated[int, Ge(0), Le(2**32)] = 0
    """Seed of their choice."""
    separator: Text = "\n\n"
    """What stands between a solved item and the next one."""
    references: Line | Fields = "references"
    """Fields that hold a right answer, or a list of them."""
    metrics: Annotated[list[Metric], MinLen(1)] = field(
        default_factory=lambda: [Metric.EXACT_MATCH, Metric.F1]
    )
    max_new_tokens: Positive = 64
    """Number of tokens after which an answer is cut off."""
    stop: list[Annotated[str, MinLen(1), MaxLen(4096)]] = field(default_factory=list)
    """Texts at which an answer ends; they are not part of it."""
    label: Line = "label"
    """Field that holds the label."""
    labels: dict[str, Text] = field(default_factory=dict)
    """What the model would write for each label."""
    choices: Line | Fields = "choices"
    """Field that holds the list of choices, or a template for each choice."""
    answer: Line = "answer"
    """Field that says which choice is right: its number from 0 on, its letter from A on, or its text."""
    path: str = ""
    """Path of the task file; not a key."""
    sha256: str = ""
    """Hash of its content; not a key."""


_OF_KIND = {
    Kind.GENERATION: ("references", "metrics", "max_new_tokens", "stop"),
    Kind.CLASSIFICATION: ("label", "labels"),
    Kind.MULTIPLE_CHOICE: ("choices", "answer"),
}
_NO_KEYS = ("path", "sha256")


def load_task(path: str | Path) -> Task:
    """Read a task file: YAML, or JSON where its name ends in .json. Raises ConfigError."""
    path = Path(path).expanduser()
    try:
        content = read_capped(path, _MAX_FILE_BYTES)
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"the task {path} cannot be read: {reason}") from error
    raw = json_of(text, path) if path.suffix == ".json" else yaml_of(text, path)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is not {_WHAT}: it should be a mapping of keys to values")
    _check_keys(raw, path)
    _check_labels(raw.get("labels"), path)
    task = parse(Task, json.dumps(raw, default=str), str(path), _WHAT)
    _check(task, path)
    task.name = task.name or path.stem
    task.path, task.sha256 = str(path), hashlib.sha256(content).hexdigest()
    return task


def json_of(text: str, path: Path) -> Any:
    """The value of JSON text. Raises ConfigError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not {_WHAT}: {error}") from None


def yaml_of(text: str, path: Path) -> Any:
    """The value of YAML text of plain values. Raises ConfigError."""
    import yaml  # type: ignore[import-untyped]

    try:
        # Nested aliases could make a short text a huge value, and a task needs none.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ConfigError(
                f"{path} is not {_WHAT}: it refers to a part of itself with *; write the part out"
            )
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not {_WHAT}: {' '.join(str(error).split())}") from None


def _check_keys(raw: dict[Any, Any], path: Path) -> None:
    """Refuse a key that does not exist, or that this kind of task does not use."""
    known = [f.name for f in fields(Task) if f.name not in _NO_KEYS]
    for key in map(str, raw):
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise ConfigError(f"{path} is not {_WHAT}: {key} is not a key; {remedy}")
        kinds = [kind for kind, keys in _OF_KIND.items() if key in keys]
        if kinds and raw.get("kind") in list(Kind) and raw["kind"] not in kinds:
            raise ConfigError(
                f"{path} is not {_WHAT}: {key} belongs to kind: {kinds[0]}, and this task has kind: {raw['kind']}"
            )


def _check_labels(labels: Any, path: Path) -> None:
    """Refuse labels that YAML took for something else: it reads an unquoted yes, no, on, off or null as no text."""
    for label in labels if isinstance(labels, dict) else ():
        if label is None or isinstance(label, bool):
            raise ConfigError(
                f"{path} is not {_WHAT}: labels has {label} as a label, which is how YAML reads a word such as yes, "
                'no, on, off or null; write it in quotes, as in "no"'
            )


def _check(task: Task, path: Path) -> None:
    """Check keys against each other."""
    problem = None
    if task.kind is Kind.CLASSIFICATION:
        values = list(task.labels.values())
        if len(task.labels) < 2:
            problem = "labels should have two labels or more, as in labels: {pos: good, neg: bad}"
        elif "" in values or len(set(values)) < len(values):
            problem = "labels has two labels with the same text, or one without text; give each its own"
    if task.n_examples and task.examples is None:
        problem = f"n_examples is {task.n_examples}, and examples names no file; give examples: FILE"
    if task.examples is not None and not task.n_examples:
        problem = "examples is given without n_examples; say how many examples to show"
    if problem is not None:
        raise ConfigError(f"{path} is not {_WHAT}: {problem}")


# ---- items -----------------------------------------------------------------------------------------------------------


class Item(NamedTuple):
    """A line of a data file."""

    id: str
    fields: dict[str, Any]


def read_items(task: Task, max_items: int | None = None) -> list[Item]:
    """The items of a task; with `max_items`, a sample of at most so many, the same at each call. Raises ConfigError."""
    found = _read(task, "data", task.data, "where", task.where)
    if max_items is None or max_items >= len(found):
        return found
    # Data files are often sorted by label, so the first items are no fair sample.
    chosen = np.random.default_rng(0).permutation(len(found))[:max_items]
    return [found[number] for number in sorted(chosen.tolist())]


def read_examples(task: Task) -> list[Item]:
    """The solved items that may be shown, in the order in which they are preferred. Raises ConfigError."""
    assert task.examples is not None
    found = _read(task, "examples", task.examples, "examples_where", task.examples_where)
    return [found[number] for number in np.random.default_rng(task.seed).permutation(len(found)).tolist()]


def _read(
    task: Task, key: str, files: str | list[str], where_key: str, where: dict[str, Value | list[Value]]
) -> list[Item]:
    found: list[Item] = []
    seen: dict[str, int] = {}
    n_lines = 0
    for name in [files] if isinstance(files, str) else files:
        path = Path(task.path).parent / Path(name).expanduser()
        try:
            lines = read_capped(path, _MAX_DATA_BYTES).decode("utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise ConfigError(
                f"{key}: {path}, which the task {task.path} names, cannot be read: {reason}"
            ) from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            n_lines += 1
            record = _record(line, f"{path}: line {number}")
            if all(_fits(record.get(name), wanted) for name, wanted in where.items()):
                own = str(record[task.id]) if task.id in record else f"{Path(name).name}:{number}"
                seen[own] = seen.get(own, 0) + 1
                found.append(Item(own if seen[own] == 1 else f"{own}#{seen[own]}", record))
    if not found:
        said = f"no item with {where_key}: {json.dumps(where, ensure_ascii=False)}" if n_lines else "no item"
        raise ConfigError(f"{key} of the task {task.path} has {said}")
    return found


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise ConfigError(f"{where} is not a JSON object")
    return record


def _fits(value: Any, wanted: Value | list[Value]) -> bool:
    allowed = wanted if isinstance(wanted, list) else [wanted]
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)
