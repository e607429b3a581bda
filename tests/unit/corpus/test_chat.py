"""The template of dialogues: prompts are prefixes of what was trained, and no text passes for a turn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.corpus.chat import ASSISTANT, SYSTEM, USER, Chat, Message, SpecialTokenError
from pretrain.corpus.tokenizer import Tokenizer
from support.trained_run import TEXTS, train_tokenizer

# What could be merged with its neighbors, or taken for a turn.
TRICKY = [
    "\n",
    "\n\n",
    " ",
    "user\n",
    "assistant\n",
    "</s>",
    "<s>",
    "</s>assistant\n",
    "▁",
    "道可道",
    "x",
    "𠮷",
]
CONTENTS = st.lists(st.sampled_from(TRICKY + TEXTS) | st.text(max_size=9), max_size=4).map("".join)
TURNS = st.builds(
    lambda role, content: {"role": role, "content": content},
    st.sampled_from([SYSTEM, USER, ASSISTANT]),
    CONTENTS,
)
DIALOGUES = st.lists(TURNS, max_size=6)
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(tmp_path_factory.mktemp("chat") / "tokenizer.model", request.param)


@pytest.fixture(scope="module")
def chat(tokenizer: Tokenizer) -> Iterator[Chat]:
    made = Chat(tokenizer)
    yield made
    made.close()


def text_of(message: Message) -> str:
    """A turn as the template writes it, without its eos."""
    return f"{message['role']}\n{message['content'].strip()}"


@given(messages=DIALOGUES)
def test_tokens_are_the_turns_whatever_is_in_them(
    tokenizer: Tokenizer, chat: Chat, messages: list[Message]
) -> None:
    """Cut at each eos, the tokens give the turns back; targets are the answers and their ends; what a model is asked
    with has just the tokens before the answer that it was taught. Names of special tokens are refused."""
    if any(name in message["content"] for name in SPECIAL for message in messages):
        for encode in (chat.encode_dialogue, chat.encode_prompt):
            with pytest.raises(SpecialTokenError, match="special token"):
                encode(messages)
        return
    tokens, targets, n_bytes = chat.encode_dialogue(messages)
    assert tokens[0] == tokenizer.bos_id
    assert tokens.count(tokenizer.bos_id) == 1
    turns: list[list[int]] = [[]]
    for token in tokens[1:]:
        turns[-1].append(token)
        if token == tokenizer.eos_id:
            turns.append([])
    assert turns.pop() == []
    assert [tokenizer.decode(turn) for turn in turns] == [text_of(message) for message in messages]
    spans = [tokens[a:b] for a, b in zip(targets[::2], targets[1::2], strict=True)]
    answers = [
        n for n, message in enumerate(messages) if message["role"] == ASSISTANT and message["content"].strip()
    ]
    contents = [messages[number]["content"].strip() for number in answers]
    assert [tokenizer.decode(span) for span in spans] == contents
    assert all(span[-1] == tokenizer.eos_id for span in spans)
    assert n_bytes == sum(len(content.encode()) for content in contents)
    for number, start in zip(answers, targets[::2], strict=True):
        assert chat.encode_prompt(messages[:number]) == tokens[:start]


def test_a_dialogue_by_example(tokenizer: Tokenizer, chat: Chat) -> None:
    messages = [
        {"role": SYSTEM, "content": "Be brief."},
        {"role": USER, "content": "Hi"},
        {"role": ASSISTANT, "content": "Hello!"},
    ]
    parts = [tokenizer.encode(text) for text in ("system\nBe brief.", "user\nHi", "assistant\n", "Hello!")]
    bos, eos = [tokenizer.bos_id], [tokenizer.eos_id]
    prompt = bos + parts[0] + eos + parts[1] + eos + parts[2]
    assert chat.encode_prompt(messages[:2]) == prompt
    tokens, targets, n_bytes = chat.encode_dialogue(messages)
    assert tokens == prompt + parts[3] + eos
    assert targets == [len(prompt), len(tokens)]
    assert n_bytes == len("Hello!")
    assert chat.end_ids == {tokenizer.eos_id}
    assert chat.encode_dialogue(messages, loss_end=False).targets == [len(prompt), len(tokens) - 1]
    every = chat.encode_dialogue(messages, loss_roles=[SYSTEM, USER, ASSISTANT]).targets
    assert [tokenizer.decode(tokens[a:b]) for a, b in zip(every[::2], every[1::2], strict=True)] == [
        "Be brief.",
        "Hi",
        "Hello!",
    ]
