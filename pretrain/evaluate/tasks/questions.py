"""Turns the items of a task into questions: filled templates, solved examples, choices and right answers.

What an item says is data: a template replaces `{name}` once, and braces in an item's text mean nothing.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pretrain.errors import ConfigError
from pretrain.evaluate.tasks.task import Item, Kind, Task, read_examples, read_items

_PARTS = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


class Solved(NamedTuple):
    """A prompt and its right answer."""

    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked for one item."""

    id: str
    hash: str
    """Hash of the item's own prompt, choices and right answers, by which two results know the same item."""
    prompt: str
    examples: Sequence[Solved]
    choices: Sequence[str]
    """What the model may write; none where it writes freely."""
    right: int
    """Number of the right choice; -1 without choices."""
    references: Sequence[str]
    texts: Sequence[str]
    """The texts of the item itself, without those of the task: what a corpus may hold."""


class Unscored(NamedTuple):
    """An item that has no score, and why."""

    id: str
    reason: str


class _Unusable(Exception):
    """Carries why an item cannot be asked."""


def questions_of(
    task: Task, clean: Callable[[str], str], max_items: int | None = None
) -> tuple[list[Question], list[Unscored]]:
    """The questions of a task, and the items that are none. `clean` brings text into the form of the training text.

    Raises ConfigError for data that cannot be read, a template that fits no item, a label that the task lacks, and a
    task without any question.
    """
    items = read_items(task, max_items)
    _check_templates(task, items)
    examples = _examples(task, clean) if task.n_examples else []
    questions: list[Question] = []
    unscored: list[Unscored] = []
    for item in items:
        try:
            question = _question(task, item, clean)
        except _Unusable as why:
            unscored.append(Unscored(item.id, str(why)))
            continue
        # An item that is an example, too, must not see its own answer.
        shown = [example for known, example in examples if known != question.hash][: task.n_examples]
        questions.append(Question(**{**vars(question), "examples": shown}))
    if not questions:
        raise ConfigError(
            f"the task {task.path} has no item that can be scored: {unscored[0].id!r} {unscored[0].reason}"
        )
    return questions, unscored


def _question(task: Task, item: Item, clean: Callable[[str], str]) -> Question:
    values = item.fields
    prompt, choices, references, right = clean(fill(task.prompt, values)), list[str](), list[str](), -1
    texts = [values[name] for name in _names_in(task.prompt)]
    match task.kind:
        case Kind.GENERATION:
            references = [clean(text) for text in _references(task, values)]
            texts += references
        case Kind.CLASSIFICATION:
            label = _text(values, task.label)
            if label not in task.labels:
                raise ConfigError(
                    f"the task {task.path} has an item with the label {label!r} ({item.id}), which is not one of its "
                    f"labels {', '.join(task.labels)}; add it to labels, or leave such items out with where"
                )
            choices, right = list(map(clean, task.labels.values())), list(task.labels).index(label)
        case Kind.MULTIPLE_CHOICE:
            choices = list(map(clean, _choices(task, values)))
            right = _right(task, values, choices)
            texts += choices
    return Question(
        id=item.id,
        hash=_hash([prompt, choices, right, references]),
        prompt=prompt,
        examples=(),
        choices=choices,
        right=right,
        references=references,
        texts=[clean(text if isinstance(text, str) else json.dumps(text)) for text in texts],
    )


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


# ---- templates -------------------------------------------------------------------------------------------------------


def fill(template: str, values: dict[str, Any]) -> str:
    """A template with each `{name}` replaced by that value, and doubled braces by single ones."""

    def part(found: re.Match[str]) -> str:
        return found[0][0] if found[1] is None else _text(values, found[1].strip())

    return _PARTS.sub(part, template)


def _names_in(template: str) -> list[str]:
    return [name.strip() for name in _PARTS.findall(template) if name.strip()]


def _text(values: dict[str, Any], name: str) -> str:
    if values.get(name) is None:
        raise _Unusable(f"has no field {name!r}")
    value = values[name]
    if isinstance(value, list | dict):
        raise _Unusable(f"has a {type(value).__name__} in the field {name!r}, where a text is needed")
    return value if isinstance(value, str) else json.dumps(value)


def _check_templates(task: Task, items: Sequence[Item]) -> None:
    """Refuse a template with a stray brace, and one with a field that no item has."""
    templates = {"prompt": [task.prompt]}
    if task.kind is Kind.MULTIPLE_CHOICE and isinstance(task.choices, list):
        templates["choices"] = task.choices
    known = list(dict.fromkeys(name for item in items for name in item.fields))
    for key, texts in templates.items():
        for text in texts:
            if any(found[0] in ("{", "}") for found in _PARTS.finditer(text)):
                raise ConfigError(
                    f"{key} of the task {task.path} has a single brace; write a brace as {{{{ or }}}}"
                )
            for name in _names_in(text):
                if name not in known:
                    close = difflib.get_close_matches(name, known, n=1)
                    remedy = (
                        f"did you mean {{{close[0]}}}?"
                        if close
                        else f"the items have {', '.join(known[:20])}"
                    )
                    raise ConfigError(
                        f"{key} of the task {task.path} has {{{name}}}, which no item has; {remedy}"
                    )


# ---- right answers ---------------------------------------------------------------------------------------------------


def _references(task: Task, values: dict[str, Any]) -> list[str]:
    names = [task.references] if isinstance(task.references, str) else task.references
    found: list[str] = []
    for name in names:
        value = values.get(name)
        found += [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]
    found = [text for text in found if text.strip()]
    if not found:
        raise _Unusable(f"has no reference in {' or '.join(map(repr, names))}")
    return found


def _choices(task: Task, values: dict[str, Any]) -> list[str]:
    if isinstance(task.choices, list):
        return [fill(template, values) for template in task.choices]
    found = values.get(task.choices)
    if (
        not isinstance(found, list)
        or len(found) < 2
        or not all(isinstance(one, str) and one for one in found)
    ):
        raise _Unusable(f"has no list of two texts or more in the field {task.choices!r}")
    return found


def _right(task: Task, values: dict[str, Any], choices: Sequence[str]) -> int:
    value = values.get(task.answer)
    if value is None:
        raise _Unusable(f"has no field {task.answer!r}")
    number = -1
    if isinstance(value, str):
        letter = ord(value.strip().upper()) - ord("A") if len(value.strip()) == 1 else -1
        number = choices.index(value) if value in choices else letter
    elif isinstance(value, int) and not isinstance(value, bool):
        number = value
    if not 0 <= number < len(choices):
        raise _Unusable(f"has the answer {value!r}, which is none of its {len(choices)} choices")
    return number


# ---- examples --------------------------------------------------------------------------------------------------------


def _examples(task: Task, clean: Callable[[str], str]) -> list[tuple[str, Solved]]:
    """The solved items to show, the first ones first, each with its hash. Of labels, each has its turn."""
    by_right: dict[int, list[tuple[str, Solved]]] = {}
    for item in read_examples(task):
        try:
            question = _question(task, item, clean)
        except _Unusable as why:
            raise ConfigError(f"examples of the task {task.path}: the item {item.id!r} {why}") from None
        answer = question.references[0] if question.references else question.choices[question.right]
        turn = question.right if task.kind is Kind.CLASSIFICATION else 0
        by_right.setdefault(turn, []).append((question.hash, Solved(question.prompt, answer)))
    if task.kind is Kind.CLASSIFICATION:
        lacking = [label for number, label in enumerate(task.labels) if number not in by_right]
        if lacking:
            raise ConfigError(
                f"examples of the task {task.path} have no item with the label {', '.join(map(repr, lacking))}"
            )
    rows = list(by_right.values())
    found = [row[turn] for turn in range(max(map(len, rows))) for row in rows if turn < len(row)]
    if len(found) < task.n_examples:
        raise ConfigError(
            f"examples of the task {task.path} have {len(found)} items; n_examples is {task.n_examples}"
        )
    return found
