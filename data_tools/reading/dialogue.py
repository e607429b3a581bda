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
UNREAD = ("system", "history", "tools", "functions", "conversations", "completion", "chosen", "rejected")
"""Fields in which other programs keep parts of a dialogue. A record whose text is there is refused, because leaving it
out in silence would train on another dialogue."""
_UNREAD_IN_TURN = ("tool_calls", "function_call", "reasoning_content", "thinking", "weight", "train")


class NoDialogueError(ValueError):
    """A record is not a dialogue. The message continues a sentence that begins with the record's name."""


def parse(record: dict[str, Any]) -> list[Message]:
    """The dialogue of a record, with cleaned contents and without blank turns. Raises NoDialogueError."""
    if record.get(MESSAGES) is not None:
        found, read = _messages(record[MESSAGES]), {MESSAGES}
    else:
        found, read = _pair(record)
    unread = [name for name in (*UNREAD, *FIELDS) if name not in read and _says_something(record.get(name))]
    if unread:
        raise NoDialogueError(
            f"has text in the field {unread[0]!r} beside {' and '.join(sorted(read))}, which would be left out; turn "
            f"it into {MESSAGES}, or remove it"
        )
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
        unread = [name for name in _UNREAD_IN_TURN if _says_something(turn.get(name))]
        if unread:
            raise NoDialogueError(
                f"has {unread[0]!r} in {where}, which would be left out; remove it, or this record"
            )
        found.append(Message(turn["role"], turn["content"]))
    return found


def _says_something(value: Any) -> bool:
    """Whether a field that is not read holds something: false for an empty value, and for a weight of 1."""
    return value not in (None, "", [], {}, 1) and not (isinstance(value, str) and not value.strip())


def _pair(record: dict[str, Any]) -> tuple[list[Message], set[str]]:
    """The dialogue of a record without messages, and the names of the fields that were read."""
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
    turns = [
        Message(USER, f"{question}\n\n{given}" if given.strip() else question),
        Message(ASSISTANT, answer),
    ]
    return turns, {pair[0], pair[1], *({PAIR_INPUT} if pair == PAIRS[1] else ())}


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
