"""Task files and their items: what is refused and how it is said, templates, solved examples and right answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.text import clean
from pretrain.errors import ConfigError
from pretrain.evaluate.tasks.questions import Question, Unscored, fill, questions_of
from pretrain.evaluate.tasks.task import Kind, Metric, Task, load_task, read_items

ITEMS = [
    {"id": "one", "text": "so good", "label": "pos"},
    {"id": "two", "text": "so bad", "label": "neg"},
    {"id": "three", "text": "not bad", "label": "pos"},
]
SENTIMENT = {"kind": "classification", "data": "items.jsonl", "prompt": "{text}:"}
LABELS = {"labels": {"pos": " yes", "neg": " no"}}


def write_items(path: Path, items: list[Any]) -> None:
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")


def write_task(folder: Path, keys: dict[str, Any], items: list[Any] = ITEMS) -> Task:
    write_items(folder / "items.jsonl", items)
    (folder / "task.json").write_text(json.dumps(keys), encoding="utf-8")
    return load_task(folder / "task.json")


def asked(
    folder: Path, keys: dict[str, Any], items: list[Any] = ITEMS
) -> tuple[list[Question], list[Unscored]]:
    return questions_of(write_task(folder, keys, items), clean)


# --- the file ---


def test_a_task_in_yaml(tmp_path: Path) -> None:
    write_items(tmp_path / "items.jsonl", ITEMS)
    path = tmp_path / "说话.yaml"
    path.write_text(
        "kind: generation\ndata: items.jsonl\nprompt: '{text}'\nmetrics: [bleu, f1]\nlanguage: zh\n",
        encoding="utf-8",
    )
    task = load_task(path)
    assert (task.name, task.kind, task.metrics) == ("说话", Kind.GENERATION, [Metric.BLEU, Metric.F1])
    assert len(task.sha256) == 64


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"promt": "x"}, "promt is not a key; did you mean prompt?"),
        ({"stop": ["x"]}, "stop belongs to kind: generation"),
        ({"kind": "clasification"}, "kind is 'clasification'"),
        ({"n_examples": "3"}, "n_examples is '3'"),
        ({"n_examples": 3}, "examples names no file"),
        ({"examples": "items.jsonl"}, "examples is given without n_examples"),
        ({"labels": {"pos": "a"}}, "two labels or more"),
        ({"labels": {"pos": "a", "neg": "a"}}, "two labels with the same text"),
        ({"labels": {"pos": "a", "neg": ""}}, "one without text"),
        ({"path": "x"}, "path is not a key"),
        ({"name": "../x"}, "name is '../x'"),
    ],
)
def test_what_a_task_says_wrong_is_named(tmp_path: Path, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=r"task\.json") as error:
        write_task(tmp_path, SENTIMENT | LABELS | keys)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_task_without_a_key_that_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prompt is missing"):
        write_task(tmp_path, {"kind": "generation", "data": "items.jsonl"})


@pytest.mark.parametrize("text", ["a: &x [1]\nb: *x\n", "a: [1\n", "- 1\n", "!!python/name:os.system\n", ""])
def test_yaml_that_is_no_task(tmp_path: Path, text: str) -> None:
    (tmp_path / "task.yaml").write_text(text)
    with pytest.raises(ConfigError, match="is not a task"):
        load_task(tmp_path / "task.yaml")


def test_labels_that_yaml_takes_for_something_else(tmp_path: Path) -> None:
    """Numbers are fine: an item's 0 is the label 0."""
    path, head = tmp_path / "task.yaml", "kind: classification\ndata: x\nprompt: '{a}'\n"
    for labels in ("{yes: a, no: b}", "{pos: a, null: b}"):
        path.write_text(f"{head}labels: {labels}\n")
        with pytest.raises(ConfigError, match="write it in quotes"):
            load_task(path)
    path.write_text(f"{head}labels: {{0: a, 'no': b}}\n")
    assert load_task(path).labels == {"0": "a", "no": "b"}


# --- items ---


def test_items_are_chosen_by_their_fields(tmp_path: Path) -> None:
    items = [{"n": 1, "k": True}, {"n": 2, "k": 1}, {"n": 3, "k": "a"}, {"n": 4}]
    found = [
        [
            item.fields["n"]
            for item in read_items(write_task(tmp_path, SENTIMENT | LABELS | {"where": where}, items))
        ]
        for where in ({"k": True}, {"k": [1, "a"]}, {"k": None}, {})
    ]
    assert found == [[1], [2, 3], [4], [1, 2, 3, 4]]
    with pytest.raises(ConfigError, match="no item with where"):
        read_items(write_task(tmp_path, SENTIMENT | LABELS | {"where": {"k": "b"}}, items))


def test_every_item_has_its_own_id(tmp_path: Path) -> None:
    items = [{"id": "a"}, {"id": "a"}, {}, {"id": 7}]
    found = read_items(write_task(tmp_path, SENTIMENT | LABELS, items))
    assert [item.id for item in found] == ["a", "a#2", "items.jsonl:3", "7"]


def test_a_sample_is_the_same_at_each_call_and_not_the_beginning(tmp_path: Path) -> None:
    task = write_task(tmp_path, SENTIMENT | LABELS, [{"id": n} for n in range(100)])
    one, other = ([item.id for item in read_items(task, 10)] for _ in range(2))
    assert one == other
    assert one == sorted(one, key=int) and int(one[-1]) > 50
    assert len(read_items(task, 1000)) == 100


def test_data_that_is_no_file(tmp_path: Path) -> None:
    for data, says in (("/dev/zero", "is not a regular file"), ("nowhere.jsonl", "No such file")):
        with pytest.raises(ConfigError, match=says):
            asked(tmp_path, SENTIMENT | LABELS | {"data": data})


def test_a_line_that_is_no_object_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"items.jsonl: line 2 is not a JSON object"):
        asked(tmp_path, SENTIMENT | LABELS, [ITEMS[0], [1]])


# --- templates ---


@given(st.text(), st.text())
def test_what_an_item_says_is_data(one: str, other: str) -> None:
    assert fill("<{a}{{x}}{ b }>", {"a": one, "b": other}) == f"<{one}{{x}}{other}>"


@pytest.mark.parametrize(
    ("prompt", "says"),
    [("{txt}", "did you mean {text}?"), ("{text", "a single brace"), ("{zzz}", "the items have id")],
)
def test_a_template_that_fits_no_item(tmp_path: Path, prompt: str, says: str) -> None:
    with pytest.raises(ConfigError, match="prompt of the task") as error:
        asked(tmp_path, SENTIMENT | LABELS | {"prompt": prompt})
    assert says in str(error.value)


def test_an_item_that_lacks_a_field_is_named(tmp_path: Path) -> None:
    items = [*ITEMS, {"id": "four", "label": "pos"}, {"id": "five", "label": "pos", "text": ["a"]}]
    questions, unscored = asked(tmp_path, SENTIMENT | LABELS, items)
    assert len(questions) == 3
    assert [item.id for item in unscored] == ["four", "five"]
    assert "'text'" in unscored[0].reason and "list" in unscored[1].reason


# --- right answers ---


def test_labels(tmp_path: Path) -> None:
    questions, _ = asked(tmp_path, SENTIMENT | LABELS)
    assert [(q.prompt, q.right) for q in questions] == [("so good:", 0), ("so bad:", 1), ("not bad:", 0)]
    assert {tuple(q.choices) for q in questions} == {(" yes", " no")}
    with pytest.raises(ConfigError, match=r"label 'neutral' \(x\)"):
        asked(tmp_path, SENTIMENT | LABELS, [*ITEMS, {"id": "x", "text": "so", "label": "neutral"}])


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (1, 1),
        ("B", 1),
        (" c", 2),
        ("1", 0),
        ("2", 1),
        (3, None),
        ("D", None),
        (True, None),
        (None, None),
        ("7", None),
    ],
)
def test_the_right_choice(tmp_path: Path, answer: Any, right: int | None) -> None:
    keys = {"kind": "multiple_choice", "data": "items.jsonl", "prompt": "{q}"}
    items = [{"q": "x", "choices": ["1", "2", "c"], "answer": value} for value in (0, answer)]
    questions, unscored = asked(tmp_path, keys, items)
    assert [q.right for q in questions[1:]] == ([] if right is None else [right])
    assert len(unscored) == (right is None)


def test_choices_by_template(tmp_path: Path) -> None:
    keys = {"kind": "multiple_choice", "data": "items.jsonl", "prompt": "{q}", "choices": ["{a}", "not {a}"]}
    questions, _ = asked(tmp_path, keys, [{"q": "x", "a": "so", "answer": "A"}])
    assert questions[0].choices == ["so", "not so"]


def test_references(tmp_path: Path) -> None:
    keys = {"kind": "generation", "data": "items.jsonl", "prompt": "{q}", "references": ["r", "s"]}
    items = [{"q": "x", "r": "a", "s": ["b", "c"]}, {"q": "x", "r": " "}, {"q": "x", "r": ["cafe\u0301"]}]
    questions, unscored = asked(tmp_path, keys, items)
    assert [q.references for q in questions] == [["a", "b", "c"], ["caf\u00e9"]]
    assert "no reference in 'r' or 's'" in unscored[0].reason
    with pytest.raises(ConfigError, match=r"no item that can be scored.*no reference"):
        asked(tmp_path, keys, [{"q": "x"}])


# --- solved examples ---


def test_an_item_does_not_see_its_own_answer(tmp_path: Path) -> None:
    questions, _ = asked(tmp_path, SENTIMENT | LABELS | {"examples": "items.jsonl", "n_examples": 2})
    for question in questions:
        assert len(question.examples) == 2
        assert question.prompt not in [example.prompt for example in question.examples]


def test_labels_take_turns_in_examples(tmp_path: Path) -> None:
    items = [{"text": f"good {n}", "label": "pos"} for n in range(50)] + [{"text": "bad", "label": "neg"}] * 5
    write_items(tmp_path / "train.jsonl", items)
    questions, _ = asked(tmp_path, SENTIMENT | LABELS | {"examples": "train.jsonl", "n_examples": 4})
    answers = [example.answer for example in questions[0].examples]
    assert answers.count(" yes") == answers.count(" no") == 2
    other, _ = asked(tmp_path, SENTIMENT | LABELS | {"examples": "train.jsonl", "n_examples": 4, "seed": 1})
    assert other[0].examples != questions[0].examples


def test_a_label_that_the_examples_lack(tmp_path: Path) -> None:
    write_items(tmp_path / "train.jsonl", [ITEMS[0]])
    with pytest.raises(ConfigError, match="no item with the label 'neg'"):
        asked(tmp_path, SENTIMENT | LABELS | {"examples": "train.jsonl", "n_examples": 1})
