"""The template of dialogues: prompts are prefixes of what was trained, and no text passes for a turn."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.corpus.chat import (
    ASSISTANT,
    ROLES,
    SYSTEM,
    USER,
    Message,
    encode_dialogue,
    encode_prompt,
    marker,
)
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
DIALOGUES = st.lists(st.builds(Message, st.sampled_from(ROLES), CONTENTS), max_size=6)


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(tmp_path_factory.mktemp("chat") / "tokenizer.model", request.param)


@given(messages=DIALOGUES)
def test_a_prompt_is_a_prefix_of_the_dialogue(tokenizer: Tokenizer, messages: list[Message]) -> None:
    """What the model is asked with has just the tokens before the answer that it was taught."""
    tokens, targets = encode_dialogue(tokenizer, messages)
    answers = [number for number, message in enumerate(messages) if message.role == ASSISTANT]
    for number, start in zip(answers, targets[::2], strict=True):
        assert encode_prompt(tokenizer, messages[:number]) == tokens[:start]


@given(messages=DIALOGUES)
def test_targets_are_the_answers_and_their_ends(tokenizer: Tokenizer, messages: list[Message]) -> None:
    tokens, targets = encode_dialogue(tokenizer, messages)
    spans = [tokens[a:b] for a, b in zip(targets[::2], targets[1::2], strict=True)]
    answers = [message.content for message in messages if message.role == ASSISTANT]
    assert [tokenizer.decode(span) for span in spans] == answers
    assert all(span[-1] == tokenizer.eos_id for span in spans)
    assert targets == sorted(set(targets))


@given(messages=DIALOGUES)
def test_no_content_passes_for_a_turn(tokenizer: Tokenizer, messages: list[Message]) -> None:
    """Cut at each eos, the tokens give the turns back, whatever is in them."""
    tokens = encode_dialogue(tokenizer, messages).tokens
    assert tokens[0] == tokenizer.bos_id
    assert tokens.count(tokenizer.bos_id) == 1
    turns: list[list[int]] = [[]]
    for token in tokens[1:]:
        turns[-1].append(token)
        if token == tokenizer.eos_id:
            turns.append([])
    assert turns.pop() == []
    texts = [marker(message.role) + message.content for message in messages]
    assert [tokenizer.decode(turn) for turn in turns] == texts


def test_a_dialogue_by_example(tokenizer: Tokenizer) -> None:
    messages = [Message(SYSTEM, "Be brief."), Message(USER, "Hi"), Message(ASSISTANT, "Hello!")]
    parts = [
        tokenizer.encode(text) for text in ("system\n", "Be brief.", "user\n", "Hi", "assistant\n", "Hello!")
    ]
    bos, eos = [tokenizer.bos_id], [tokenizer.eos_id]
    prompt = bos + parts[0] + parts[1] + eos + parts[2] + parts[3] + eos + parts[4]
    assert encode_prompt(tokenizer, messages[:2]) == prompt
    tokens, targets = encode_dialogue(tokenizer, messages)
    assert tokens == prompt + parts[5] + eos
    assert targets == [len(prompt), len(tokens)]
