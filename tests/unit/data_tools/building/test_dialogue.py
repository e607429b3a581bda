"""From dialogues to a corpus with a loss mask, and on: dropped, held out, shown, removed, scored, learned."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from data_tools.config import PrepareConfig, TokenizerConfig
from data_tools.prepare import prepare
from data_tools.reading import dialogue
from data_tools.remove import remove
from data_tools.verify import verify
from pretrain.config import load_config
from pretrain.corpus.chat import ASSISTANT, OWN_TEMPLATE, Chat, Message
from pretrain.corpus.chat_template import DialogueError
from pretrain.corpus.manifest import load_manifest
from pretrain.corpus.shards import Corpus, documents_of
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.errors import ConfigError
from support.dialogues import chat_config, dialogues, turns
from support.preparing import config, content, run, write_jsonl
from support.trained_run import TEXTS, make_run, run_script, train_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "tokenizer.model"
    train_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def prepared(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("talks")
    source = write_jsonl(folder / "talks.jsonl", dialogues(120))
    assert prepare(chat_config(folder / "corpus", source, model=model)) == 0
    return folder / "corpus"


def messages_of(record: dict[str, Any]) -> list[Message]:
    return list(record["messages"])


def rows(messages: list[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


@pytest.fixture(scope="module")
def chat(model: Path) -> Iterator[Chat]:
    made = Chat(Tokenizer.trusted(model))
    yield made
    made.close()


# --- records ---


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": turns(("a", "b"), system="s")}, [("system", "s"), ("user", "a"), ("assistant", "b")]),
        ({"prompt": "a", "response": "b", "messages": None}, [("user", "a"), ("assistant", "b")]),
        ({"instruction": "a", "input": "", "output": "b"}, [("user", "a"), ("assistant", "b")]),
        ({"instruction": "a", "input": "c\nd", "output": "b"}, [("user", "a\n\nc\nd"), ("assistant", "b")]),
        ({"instruction": "a", "input": None, "output": "b"}, [("user", "a"), ("assistant", "b")]),
        ({"prompt": "e\u0301\r\n\x00", "response": "b"}, [("user", "é\n"), ("assistant", "b")]),
        ({"messages": turns(("a", "b"), ("c", " \n"), system="")}, [("user", "a"), ("assistant", "b"), ("user", "c")]),
        ({"messages": [{"role": "user", "content": "a", "name": "x"}]}, [("user", "a")]),
    ],
)  # fmt: skip
def test_a_record_is_a_dialogue(record: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    found = dialogue.parse(record)
    assert rows(found.messages) == expected
    assert dialogue.load(dialogue.dump(found)) == found


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"text": "x", "id": 1}, "has no dialogue (its fields: text, id); needed are messages, conversations"),
        ({"prompt": "x"}, "has no dialogue"),
        ({"messages": "x"}, "has str in the field 'messages', not a list"),
        ({"messages": [["user", "x"]]}, "has in messages[0] no role and content"),
        ({"messages": [{"role": "user"}]}, "has in messages[0] no role and content"),
        ({"messages": [*turns(("a", "b")), {"role": "judge", "content": "x"}]}, "has in messages[2] the role 'judge'"),
        ({"messages": [{"role": [], "content": "x"}]}, "has in messages[0] the role []"),
        ({"messages": [{"role": "assistant", "content": None}]}, "has in messages[0] NoneType as content, not text"),
        ({"prompt": 5, "response": "b"}, "has int in the field 'prompt', not text"),
        ({"instruction": "a", "input": ["c"], "output": "b"}, "has list in the field 'input', not text"),
    ],
)  # fmt: skip
def test_a_record_that_is_none_is_named(record: dict[str, Any], words: str) -> None:
    with pytest.raises(DialogueError) as caught:
        dialogue.parse(record)
    assert words in str(caught.value)


# --- prepared ---


def test_documents_are_the_dialogues_in_the_template(prepared: Path, chat: Chat) -> None:
    assert (prepared / "chat_template.jinja").read_text() == OWN_TEMPLATE
    expected = {record["id"]: messages_of(record) for record in dialogues(120)}
    found = {}
    for manifest in (prepared / "manifest.json", prepared / "heldout/manifest.json"):
        assert load_manifest(manifest).loss_mask
        for document in documents_of(Corpus(manifest)):
            found[document.id] = document
    assert found.keys() == expected.keys()
    for name, messages in expected.items():
        tokens, targets, n_bytes = chat.encode_dialogue(messages)
        assert found[name].tokens.tolist() == tokens
        marked = {at for a, b in zip(targets[::2], targets[1::2], strict=True) for at in range(a, b)}
        assert set(found[name].is_target.nonzero()[0].tolist()) == marked
        assert found[name].text_bytes == len("\n".join(m["content"] for m in messages).encode())
        assert found[name].target_bytes == n_bytes
        assert n_bytes == sum(len(m["content"].strip().encode()) for m in messages if m["role"] == ASSISTANT)
    assert any(len(document.tokens) > 256 for document in found.values())
    assert "documents are dialogues with a loss mask" in (prepared / "README.md").read_text()
    assert verify(prepared) == []


def test_held_out_dialogues_can_be_prepared_again(prepared: Path, model: Path, tmp_path: Path) -> None:
    text = prepared / "heldout/documents.jsonl.gz"
    with gzip.open(text, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    assert 3 < len(records) < 30
    for record in records:
        assert list(record) == ["id", "source", "text", "messages"]
        assert record["text"] == "\n".join(turn["content"] for turn in record["messages"])
    assert prepare(chat_config(tmp_path / "again", text, model=model, heldout_frac=0)) == 0
    first, again = (
        {d.id: (d.tokens.tolist(), d.is_target.tolist()) for d in documents_of(Corpus(path))}
        for path in (prepared / "heldout/manifest.json", tmp_path / "again/manifest.json")
    )
    assert first == again


def test_workers_and_parts_change_no_byte(prepared: Path, model: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "talks.jsonl", dialogues(120))
    options = chat_config(tmp_path / "corpus", source, model=model, part_bytes=3000)
    options.workers = 2
    assert prepare(options) == 0
    for folder in ("shards", "heldout"):
        assert content(tmp_path / "corpus" / folder) == content(prepared / folder)


def test_the_funnel_names_what_was_dropped(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = dialogues(20)
    same_question = {"messages": turns((good[4]["messages"][0]["content"], "Another answer to it."))}
    records = [
        *good,
        {"id": "same", "messages": good[3]["messages"]},
        same_question,
        {"messages": [{"role": "user", "content": "Nobody answers me."}]},
        {"messages": turns(("I get silence", " \n"))},
        {"messages": turns(("a", "b"))},
        {"messages": turns(("Tell me all", "x" * 3000))},
        {"messages": [*turns(("a", "a long enough answer")), {"role": "tool", "content": "x"}]},
        {"messages": turns(("What is </s>?", "The end of a document."))},
        {"messages": turns(("Say a lot", "word " * 390))},
    ]
    source = write_jsonl(tmp_path / "in.jsonl", records)
    options = {"model": model, "max_chars": 2000, "chat.max_tokens": 700}
    with pytest.raises(ConfigError, match=r"in\.jsonl:27 cannot be written .* tools.*max_bad_records"):
        prepare(chat_config(tmp_path / "out", source, **options))
    assert prepare(chat_config(tmp_path / "out", source, max_bad_records=1, **options)) == 0
    report = json.loads((tmp_path / "out/prepare.json").read_text())
    dropped = {"duplicate": 1, "no_answer": 2, "too_short": 1, "too_long": 1, "bad_record": 1}
    dropped |= {"special_token": 1, "too_many_tokens": 1}
    assert report["funnel"]["dropped"] == dropped
    assert report["funnel"]["kept"] == 21
    manifests = [tmp_path / "out/manifest.json", tmp_path / "out/heldout/manifest.json"]
    assert sum(load_manifest(path).n_documents for path in manifests) == 21
    assert report["funnel"]["heldout"] == load_manifest(manifests[1]).n_documents
    shown = capsys.readouterr().out
    assert "-2 no answer" in shown and "-1 special token" in shown and "-1 too many tokens" in shown
    assert report["recipe"]["options"]["format"] == "chat"


PAIR = {"instruction": "What is a shard?", "input": "", "output": "A tar file."}
TALK = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


@pytest.mark.parametrize(
    ("record", "named"),
    [
        (TALK | {"history": [["Hi", "Hello there"]]}, "history"),
        ({"messages": [{"role": "system", "content": "a"}], "system": "b"}, "system"),
        (TALK | {"conversations": [{"from": "human", "value": "x"}]}, "conversations"),
        (TALK | {"functions": [{"name": "search"}]}, "functions"),
        ({"conversations": [{"from": "human", "value": "x", "weight": 0}]}, "weight"),
        (TALK | {"prompt": "Another question"}, "prompt"),
        ({"prompt": "a", "response": "b", "input": "and this"}, "input"),
        ({"prompt": "a", "response": "b", "rejected": "c"}, "rejected"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"name": "f"}]}]}, "tool_calls"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0}]}, "weight"),
        ({"messages": [{"role": "assistant", "content": "x", "train": False}]}, "train"),
        (
            {"messages": [{"role": "assistant", "content": "x", "reasoning_content": "Hm."}]},
            "reasoning_content",
        ),
    ],
)
def test_a_field_that_would_be_left_out_is_an_error(record: dict[str, object], named: str) -> None:
    with pytest.raises(DialogueError, match=f"'{named}'"):
        dialogue.parse(record)


def test_empty_fields_and_other_facts_leave_nothing_out() -> None:
    assert len(dialogue.parse(PAIR | {"system": " ", "history": [], "category": "qa"}).messages) == 2
    turns = [
        {"role": "assistant", "content": "x", "weight": 1, "train": True, "tool_calls": None, "name": "bot"}
    ]
    assert len(dialogue.parse({"messages": turns, "tools": [], "prompt": "", "score": 0.5}).messages) == 1


def test_parquet_holds_dialogues_too(model: Path, chat: Chat, tmp_path: Path) -> None:
    table = pyarrow.table(
        {"messages": [r["messages"] for r in dialogues(6)], "id": [str(n) for n in range(6)]}
    )
    parquet.write_table(table, tmp_path / "talks.parquet")
    pairs = {
        "instruction": ["Say it", "Sum up"],
        "input": ["", "1 and 2"],
        "output": ["It is said", "That is 3"],
    }
    parquet.write_table(pyarrow.table(pairs), tmp_path / "pairs.parquet")
    inputs = (tmp_path / "talks.parquet", tmp_path / "pairs.parquet")
    assert prepare(chat_config(tmp_path / "out", *inputs, model=model, heldout_frac=0)) == 0
    texts = {d.id: d for d in documents_of(Corpus(tmp_path / "out/manifest.json"))}
    assert set(texts) == {*map(str, range(6)), "pairs.parquet:1", "pairs.parquet:2"}
    expected = turns(("Sum up\n\n1 and 2", "That is 3"))
    assert texts["pairs.parquet:2"].tokens.tolist() == chat.encode_dialogue(expected).tokens
    parquet.write_table(pyarrow.table(pairs | {"system": ["", "Be brief."]}), tmp_path / "system.parquet")
    assert (
        prepare(chat_config(tmp_path / "one", tmp_path / "system.parquet", model=model, heldout_frac=0)) == 0
    )
    texts = {d.id: d for d in documents_of(Corpus(tmp_path / "one/manifest.json"))}
    expected = turns(("Sum up\n\n1 and 2", "That is 3"), system="Be brief.")
    assert texts["system.parquet:2"].tokens.tolist() == chat.encode_dialogue(expected).tokens
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "other.parquet")
    with pytest.raises(
        ConfigError, match=r"has no column of a dialogue \(it has body\); needed are messages"
    ):
        prepare(chat_config(tmp_path / "two", tmp_path / "other.parquet", model=model))


def test_what_cannot_hold_dialogues_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/README.md").write_text("About these dialogues.")
    with pytest.raises(
        ConfigError, match=r"README\.md is of the kind \.md, which holds no dialogues\); known are \.jsonl"
    ):
        prepare(chat_config(tmp_path / "out", tmp_path / "in", model=model))
    with pytest.raises(ConfigError, match="holds no dialogues; give files for format=chat"):
        prepare(chat_config(tmp_path / "out", Path("python"), model=model))
    with pytest.raises(ConfigError, match="format=chat needs the tokenizer of the model"):
        load_config(PrepareConfig, ["input=[x]", "output=y", "format=chat"])
    write_jsonl(tmp_path / "in/a.jsonl", dialogues(9))
    assert prepare(chat_config(tmp_path / "out", tmp_path / "in", model=model)) == 0


def test_a_recipe_of_texts_says_nothing_of_dialogues(tmp_path: Path) -> None:
    """Or corpora that were prepared before there were any would count as made with other options."""
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text * 3} for text in TEXTS])
    assert prepare(config(tmp_path / "out", source, tokenizer=TokenizerConfig(vocab_size=400))) == 0
    report = json.loads((tmp_path / "out/prepare.json").read_text())
    assert "format" not in report["recipe"]["options"]
    assert "loss_mask" not in (tmp_path / "out/manifest.json").read_text()
    assert "loss mask" not in (tmp_path / "out/README.md").read_text()


# --- and on ---


def test_removal_keeps_the_mask(prepared: Path, model: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "talks.jsonl", dialogues(120))
    output = tmp_path / "corpus"
    assert prepare(chat_config(output, source, model=model)) == 0

    def state() -> dict[str, tuple[list[int], list[bool], int]]:
        paths = (output / "manifest.json", output / "heldout/manifest.json")
        return {
            d.id: (d.tokens.tolist(), d.is_target.tolist(), d.target_bytes)
            for path in paths
            for d in documents_of(Corpus(path))
        }

    before = state()
    with gzip.open(output / "heldout/documents.jsonl.gz", "rt", encoding="utf-8") as lines:
        heldout = json.loads(next(iter(lines)))["id"]
    training = next(name for name in before if name != heldout)
    assert remove(output, {training, heldout}).total() == 2
    assert state() == {name: found for name, found in before.items() if name not in (training, heldout)}
    assert verify(output) == []
    assert load_manifest(output / "manifest.json").loss_mask
    with gzip.open(output / "heldout/documents.jsonl.gz", "rt", encoding="utf-8") as lines:
        assert all(json.loads(line)["messages"] for line in lines)


def test_show_brackets_what_is_learned(prepared: Path) -> None:
    shown = run(str(prepared), "--chunk", "0", module="show")
    assert shown.returncode == 0, shown.stderr
    first = next(iter(documents_of(Corpus(prepared / "manifest.json"))))
    [record] = [record for record in dialogues(120) if record["id"] == first.id]
    lines = "".join(
        f"{m['role']}\n" + ("⟦{}⟧\n" if m["role"] == ASSISTANT else "{}\n").format(m["content"].strip())
        for m in messages_of(record)
    ).splitlines()
    expected = [f"| {line[:110]}" for line in lines[:12]]
    assert [line for line in shown.stdout.splitlines() if line.startswith("| ")][: len(expected)] == expected
    n_targets = int(Corpus(prepared / "manifest.json").is_target(0, 0, 256).sum())
    assert f"to be predicted, in ⟦ ⟧: {n_targets} of its tokens" in shown.stdout


def test_the_script_scores_answers_only(model: Path, tmp_path: Path) -> None:
    """launch/eval.py on the held-out dialogues of a corpus that has the run's tokenizer."""
    make_run(tmp_path / "run")
    source = write_jsonl(tmp_path / "talks.jsonl", dialogues(60))
    output = tmp_path / "corpus"
    assert prepare(chat_config(output, source, model=tmp_path / "run/tokenizer.model")) == 0
    done = run_script("eval", f"run_dir={tmp_path / 'run'}", f"input=[{output / 'heldout'}]", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    documents = list(documents_of(Corpus(output / "heldout/manifest.json")))
    assert found["documents"] == len(documents)
    assert found["tokens"] == sum(int(d.is_target.sum()) for d in documents)
    assert found["text_bytes"] == sum(d.target_bytes for d in documents)
