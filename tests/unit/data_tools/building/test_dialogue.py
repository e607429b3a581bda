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

from data_tools.building.encode import LeftOutDialogues, _within
from data_tools.config import ChatConfig, LossRole, PrepareConfig, TokenizerConfig
from data_tools.prepare import prepare
from data_tools.reading import dialogue
from data_tools.reading.dialogue import Dialogue
from data_tools.remove import remove
from data_tools.show import describe_chunk
from data_tools.verify import verify
from pretrain.config import load_config
from pretrain.corpus.chat import ASSISTANT, OWN_TEMPLATE, Chat, Message
from pretrain.corpus.chat_template import DialogueError
from pretrain.corpus.manifest import Packed, load_manifest
from pretrain.corpus.shards import Corpus, documents_of
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.errors import ConfigError
from support.chat_templates import QWEN, SPECIAL
from support.dialogues import chat_config, dialogues, turns
from support.hugging_face_tokenizers import byte_level, save
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
        ({"query": "a", "response": "b", "history": ["c"]}, "has in history[0] no pair"),
        ({"query": "a", "response": "b", "history": "c"}, "has in history[0] no pair"),
        ({"conversations": [{"from": "moderator", "value": "x"}]}, "has in conversations[0] the role 'moderator'"),
        ({"conversations": [["x"]]}, "has in conversations[0] no from and value"),
        ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, "has in conversations[0] a tool call"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts that are not text"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]}, "has in messages[0] a tool call"),
        ({"messages": [{"role": "assistant", "tool_calls": 1}]}, "has in messages[0] int as tool_calls"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}]},
            "whose arguments are no JSON object",
        ),
        ({"prompt": "a", "response": "b", "tools": "x"}, "has in the field 'tools' a text that is no JSON"),
        ({"prompt": "a", "response": "b", "tools": ["x"]}, "has in the field 'tools' no list of objects"),
    ],
)  # fmt: skip
def test_a_record_that_is_none_is_named(record: dict[str, Any], words: str) -> None:
    with pytest.raises(DialogueError) as caught:
        dialogue.parse(record)
    assert words in str(caught.value)


SYSTEM_TURN = ("system", "Be brief.")
HI = [("user", "Hi"), ("assistant", "Hello there")]
CALL = {"name": "weather", "arguments": '{"city": "Oslo"}'}
CALLED = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"instruction": "a", "input": "c", "output": "b", "system": "Be brief.", "history": [["Hi", HI[1][1]]]},
            [SYSTEM_TURN, *HI, ("user", "a\n\nc"), ("assistant", "b")],
        ),
        ({"query": "a", "response": "b", "history": [["Hi", "Hello there"]]}, [*HI, ("user", "a"), ("assistant", "b")]),
        ({"prompt": "a", "completion": " b"}, [("user", "a"), ("assistant", " b")]),
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
            [("user", "a"), ("assistant", "b")],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello there"},
                ]
            },
            [SYSTEM_TURN, *HI],
        ),
        ({"conversations": turns(("Hi", "Hello there")), "system": "Be brief."}, [SYSTEM_TURN, *HI]),
        ({"messages": turns(("Hi", "Hello there")), "system": "Be brief."}, [SYSTEM_TURN, *HI]),
        ({"messages": [{"role": "developer", "content": "Be brief."}]}, [SYSTEM_TURN]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
            [("user", "a\nb")],
        ),
    ],
)  # fmt: skip
def test_dialogues_as_users_have_them(record: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    found = dialogue.parse(record)
    assert rows(found.messages) == expected
    assert dialogue.load(dialogue.dump(found)) == found


def test_tools_and_their_turns() -> None:
    """In the form of OpenAI and of ShareGPT; arguments become an object, which templates write as JSON."""
    openai = {
        "messages": [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
            {"role": "tool", "content": "", "tool_call_id": "1", "name": "weather"},
            {"role": "assistant", "content": "No."},
        ],
        "tools": [{"name": "weather"}],
    }
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "Rain?"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": ""},
            {"from": "gpt", "value": "No."},
        ],
        "tools": json.dumps(openai["tools"]),
    }
    found, other = dialogue.parse(openai), dialogue.parse(sharegpt)
    assert found.messages == [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "tool_calls": [CALLED]},
        {"role": "tool", "content": "", "tool_call_id": "1", "name": "weather"},
        {"role": "assistant", "content": "No."},
    ]
    assert other.messages[:2] == found.messages[:2] and other.messages[3] == found.messages[3]
    assert found.tools == other.tools == [{"name": "weather"}]
    for one in (found, other):
        assert dialogue.load(dialogue.dump(one)) == one
    assert dialogue.plain(found.messages) == "Rain?\n\nNo."


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


def test_a_data_set_with_nothing_to_learn_is_an_error(model: Path, tmp_path: Path) -> None:
    """At reading where nobody answers, and after tokenizing where what is left has no answer that fits."""
    silent = write_jsonl(
        tmp_path / "silent.jsonl", [{"messages": [{"role": "user", "content": "Nobody answers."}]}] * 3
    )
    with pytest.raises(ConfigError, match=r"leaves no document: 3 read, dropped: 3 no_answer"):
        prepare(chat_config(tmp_path / "out", silent, model=model))
    long = write_jsonl(tmp_path / "long.jsonl", dialogues(9))
    options = {"chat.max_tokens": 9, "heldout_frac": 0}
    with pytest.raises(ConfigError, match=r"leaves no document: 9 read, dropped: 9 too_many_tokens"):
        prepare(chat_config(tmp_path / "out", long, model=model, **options))
    names = write_jsonl(
        tmp_path / "names.jsonl", [{"prompt": f"What is </s> {n}?", "response": "x" * n} for n in range(3, 6)]
    )
    with pytest.raises(ConfigError, match=r"leaves no document: 3 read, dropped: 3 special_token"):
        prepare(chat_config(tmp_path / "out", names, model=model))


def test_longer_dialogues_are_cut_at_the_last_turn_that_fits(
    model: Path, chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short, long = turns(("a question", "an answer")), turns(("Hi you", "Hello"), ("Say more", "word " * 99))
    source = write_jsonl(tmp_path / "in.jsonl", [{"messages": short}, {"messages": long}])
    options = {"chat.max_tokens": 100, "heldout_frac": 0, "model": model}
    assert prepare(chat_config(tmp_path / "cut", source, **options)) == 0
    assert "1 of them cut at the last turn within chat.max_tokens" in capsys.readouterr().out
    found = {d.id: d for d in documents_of(Corpus(tmp_path / "cut/manifest.json"))}
    assert found["in.jsonl:2"].tokens.tolist() == chat.encode_dialogue(long[:2]).tokens
    assert found["in.jsonl:1"].tokens.tolist() == chat.encode_dialogue(short).tokens
    assert load_manifest(tmp_path / "cut/manifest.json").packed == Packed(
        sequence_tokens=100, cut_documents=1
    )
    assert prepare(chat_config(tmp_path / "drop", source, **options, **{"chat.longer": "drop"})) == 0
    assert load_manifest(tmp_path / "drop/manifest.json").packed == Packed(
        sequence_tokens=100, dropped_documents=1
    )
    assert [d.id for d in documents_of(Corpus(tmp_path / "drop/manifest.json"))] == ["in.jsonl:1"]
    assert json.loads((tmp_path / "drop/prepare.json").read_text())["funnel"]["dropped"] == {
        "too_many_tokens": 1
    }


def test_the_turn_to_cut_at_is_the_last_that_fits(chat: Chat) -> None:
    """For every limit, against trying one turn after another. A turn to be predicted need not be the assistant's."""
    pairs = [(f"question {n}", "an answer " * n) for n in range(1, 8)]
    whole = Dialogue(messages_of({"messages": turns(*pairs, system="Be brief.")}), [])
    for roles in ([LossRole.assistant], [LossRole.user, LossRole.system]):
        names = [role.value for role in roles]
        sizes = {
            n: len(chat.encode_dialogue(whole.messages[:n], loss_roles=names).tokens)
            for n in range(1, len(whole.messages) + 1)
            if n == len(whole.messages) or whole.messages[n - 1]["role"] in names
        }
        for limit in range(1, max(sizes.values()) + 4, 3):
            fitting = [n for n, size in sizes.items() if size <= limit]
            counts = LeftOutDialogues()
            one, left = _within(ChatConfig(max_tokens=limit, loss_roles=roles), chat, whole, counts)
            assert (one is None) is (not fitting)
            if one is not None:
                assert (len(left.messages), len(one.tokens)) == (fitting[-1], sizes[fitting[-1]])
            assert counts.cut == (bool(fitting) and fitting[-1] < len(whole.messages))


def test_roles_and_ends_that_count_are_chosen(model: Path, chat: Chat, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"messages": turns(("a question", "an answer"))}])
    options = {"chat.loss_roles": "[user]", "chat.loss_end": False, "heldout_frac": 0}
    assert prepare(chat_config(tmp_path / "out", source, model=model, **options)) == 0
    (document,) = documents_of(Corpus(tmp_path / "out/manifest.json"))
    tokenizer = Tokenizer.trusted(model)
    assert tokenizer.decode(document.tokens[document.is_target]) == "a question"
    assert tokenizer.eos_id not in document.tokens[document.is_target]
    with pytest.raises(ConfigError, match=r"chat\.loss_roles=\[\]"):
        chat_config(tmp_path / "out", source, model=model, **{"chat.loss_roles": "[]"})


def test_the_template_beside_a_tokenizer_is_taken(tmp_path: Path) -> None:
    """Tools included; the held-out part can be prepared again; remove keeps the template; ours can be asked for."""
    roles = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": QWEN}
    given = save(byte_level(SPECIAL), tmp_path / "given", **roles)
    records: list[dict[str, Any]] = [{"id": f"{n}", **record} for n, record in enumerate(dialogues(12))]
    call = {"role": "assistant", "tool_calls": [CALLED]}
    talk = [
        *turns(("Rain today?", "I look."))[:1],
        call,
        {"role": "tool", "content": "sunny"},
        *turns(("x", "It is dry."))[1:],
    ]
    records.append({"id": "tools", "messages": talk, "tools": [{"name": "weather"}]})
    source = write_jsonl(tmp_path / "in.jsonl", records)
    assert prepare(chat_config(tmp_path / "out", source, model=given, heldout_frac=0.3)) == 0
    assert (tmp_path / "out/chat_template.jinja").read_text() == QWEN
    tokenizer = Tokenizer.trusted(tmp_path / "out/tokenizer.json")
    paths = [tmp_path / "out/manifest.json", tmp_path / "out/heldout/manifest.json"]
    found = {d.id: d.tokens.tolist() for path in paths for d in documents_of(Corpus(path))}
    with_template = Chat(tokenizer, QWEN)
    assert found["tools"] == with_template.encode_dialogue(talk, [{"name": "weather"}]).tokens
    assert tokenizer.special_tokens["<|im_start|>"] in found["tools"]
    with_template.close()
    again = tmp_path / "out/heldout/documents.jsonl.gz"
    assert prepare(chat_config(tmp_path / "again", again, model=tmp_path / "out", heldout_frac=0)) == 0
    second = {d.id: d.tokens.tolist() for d in documents_of(Corpus(tmp_path / "again/manifest.json"))}
    assert second.items() <= found.items() and second
    first = next(iter(documents_of(Corpus(paths[0])))).id
    assert remove(tmp_path / "out", {first}) == {first: 1}
    assert (tmp_path / "out/chat_template.jinja").read_text() == QWEN
    assert verify(tmp_path / "out") == []
    ours = {"chat.template": "ours", "max_bad_records": 1}
    assert prepare(chat_config(tmp_path / "ours", source, model=given, **ours)) == 0
    assert (tmp_path / "ours/chat_template.jinja").read_text() == OWN_TEMPLATE
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for")
    with pytest.raises(ConfigError, match="no valid Jinja"):
        prepare(chat_config(tmp_path / "broken", source, model=given, **{"chat.template": broken}))


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


def test_whole_dialogues_are_packed_into_sequences(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By default where the length is given. Counts are without filler, and `show`, `verify` and `remove` know it."""
    source = write_jsonl(tmp_path / "talks.jsonl", dialogues(60))
    options = {"chat.max_tokens": 280, "chunk_tokens": 560, "shard_bytes": 4096}
    output, loose = tmp_path / "corpus", tmp_path / "loose"
    assert prepare(chat_config(loose, source, model=model, **options, **{"chat.pack": False})) == 0
    assert "dialogues are not packed" in capsys.readouterr().out
    assert prepare(chat_config(output, source, model=model, **options)) == 0
    shown = capsys.readouterr().out

    def state(folder: Path) -> dict[str, tuple[list[int], list[bool], int]]:
        return {
            d.id: (d.tokens.tolist(), d.is_target.tolist(), d.target_bytes)
            for path in (folder / "manifest.json", folder / "heldout/manifest.json")
            for d in documents_of(Corpus(path))
        }

    before, manifest = state(output), load_manifest(output / "manifest.json")
    assert before == state(loose), "packing changes no dialogue"
    n_cut = json.loads((output / "prepare.json").read_text())["funnel"]["cut"]
    assert manifest.packed == Packed(
        sequence_tokens=280, dropped_documents=60 - len(before), cut_documents=n_cut
    )
    assert n_cut > 5
    assert 0 < manifest.filler_tokens < 0.5 * manifest.n_tokens
    in_order, room = 0, 0  # sequences that dialogues need if they come in the order of their hashes
    for one in documents_of(Corpus(loose / "manifest.json")):
        in_order, room = (in_order + 1, 280) if len(one.tokens) > room else (in_order, room)
        room -= len(one.tokens)
    assert manifest.n_tokens // 280 < in_order
    n_tokens = sum(len(tokens) for tokens, _, _ in before.values())
    heldout = load_manifest(output / "heldout/manifest.json")
    assert manifest.document_tokens + heldout.document_tokens == n_tokens
    statistics = json.loads((output / "statistics.json").read_text())
    assert statistics["tokens"] + statistics["heldout"]["tokens"] == n_tokens
    filler = f"packed into {manifest.n_tokens // 280} sequences of 280 tokens"
    assert filler in shown and filler in (output / "README.md").read_text()
    shards = {shard.name: shard.sha256 for shard in manifest.shards}
    assert verify(output) == [] and len(shards) > 2

    corpus = Corpus(output / "manifest.json")
    text = describe_chunk(corpus, Tokenizer.trusted(output / "tokenizer.model"), 0)
    ends, starts = corpus.documents(0).ends, corpus.documents(0).starts
    assert (ends[:-1] < starts[1:]).any() or ends[-1] < 560, "the chunk has filler"
    assert "\n| \n" not in text
    removed = corpus.documents(corpus.n_chunks - 2).ids[1]
    assert remove(output, {removed}) == {removed: 1}
    assert state(output) == {name: found for name, found in before.items() if name != removed}
    assert verify(output) == []
    after = load_manifest(output / "manifest.json")
    assert after.packed == manifest.packed
    assert after.shards[0].sha256 == manifest.shards[0].sha256, "nothing was removed there"
    with pytest.raises(ConfigError, match=r"chunk_tokens=256 is no multiple of chat\.max_tokens=280"):
        chat_config(output, source, model=model, **options | {"chunk_tokens": 256})


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
