"""Dialogues as input (`format=chat`): the forms of a record, and the text that represents a dialogue.

During preparation a dialogue is a text like any other: compact JSON, [[role, content], ...]. The hash of this text
finds duplicates of the whole dialogue and decides its position.
"""

from __future__ import annotations

import json
from typing import Any

from data_tools import text as clean
from pretrain.corpus.chat import ASSISTANT, ROLES, USER, Message

MESSAGES = "messages"
PAIRS = (("prompt", "response"), ("instruction", "output"))
PAIR_INPUT = "input"
"""Optional input that follows an instruction, in a paragraph of its own."""
FIELDS = (MESSAGES, *(name for pair in PAIRS for name in pair), PAIR_INPUT)
NEEDED = "messages, prompt and response, or instruction and output"


class NoDialogueError(ValueError):
    """A record is not a dialogue. The message continues a sentence that begins with the record's name."""


def parse(record: dict[str, Any]) -> list[Message]:
    """The dialogue of a record, with cleaned contents and without blank turns. Raises NoDialogueError."""
    if record.get(MESSAGES) is not None:
        found = _messages(record[MESSAGES])
    else:
        found = _pair(record)
    cleaned = [Message(message.role, clean.clean(message.content)) for message in found]
    return [message for message in cleaned if message.content.strip()]


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list):
        raise NoDialogueError(f"has {type(value).__name__} in the field {MESSAGES!r}, not a list")
    found = []
    for number, turn in enumerate(value):
        where = f"{MESSAGES}[{number}]"
        if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
            raise NoDialogueError(f"has in {where} no role and content")
        if turn["role"] not in ROLES:
            raise NoDialogueError(f"has in {where} the role {turn['role']!r}; known are {', '.join(ROLES)}")
        if not isinstance(turn["content"], str):
            raise NoDialogueError(f"has in {where} {type(turn['content']).__name__} as content, not text")
        found.append(Message(turn["role"], turn["content"]))
    return found


def _pair(record: dict[str, Any]) -> list[Message]:
    pair = next((pair for pair in PAIRS if all(record.get(name) is not None for name in pair)), None)
    if pair is None:
        names = ", ".join(map(str, list(record)[:8])) or "none"
        raise NoDialogueError(f"has no dialogue (its fields: {names}); needed are {NEEDED}")
    more = record.get(PAIR_INPUT) if pair == PAIRS[1] else None
    texts = {pair[0]: record[pair[0]], PAIR_INPUT: "" if more is None else more, pair[1]: record[pair[1]]}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise NoDialogueError(f"has {type(text).__name__} in the field {name!r}, not text")
    question, given, answer = texts.values()
    return [
        Message(USER, f"{question}\n\n{given}" if given.strip() else question),
        Message(ASSISTANT, answer),
    ]


def has_answer(messages: list[Message]) -> bool:
    """Whether the assistant says anything, so that there is something to learn."""
    return any(message.role == ASSISTANT for message in messages)


def dump(messages: list[Message]) -> str:
    """The text that represents a dialogue; only equal dialogues have equal texts."""
    return json.dumps(messages, ensure_ascii=False, separators=(",", ":"))


def load(text: str) -> list[Message]:
    """The inverse of `dump`."""
    return [Message(*message) for message in json.loads(text)]


def plain(messages: list[Message]) -> str:
    """The contents, one after another, which count as the text of the dialogue."""
    return "\n".join(message.content for message in messages)
