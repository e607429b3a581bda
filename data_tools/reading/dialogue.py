"""Dialogues as input (`format=chat`): the forms of a record, and the text that represents a dialogue.

During preparation a dialogue is a text like any other: compact JSON, [[role, content], ...]. The hash of this text
finds duplicates of the whole dialogue and decides its position.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from data_tools import text as clean
from pretrain.corpus.chat import ASSISTANT, ROLES, SYSTEM, TOOL, USER, Message
from pretrain.corpus.chat_template import DialogueError

MESSAGES, CONVERSATIONS = "messages", "conversations"
PAIRS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("query", "response"))
_WITH_INPUT = PAIRS[2]
PAIR_INPUT = "input"
"""Optional input that follows an instruction, in a paragraph of its own."""
FIELDS = tuple(
    dict.fromkeys((MESSAGES, CONVERSATIONS, *(name for pair in PAIRS for name in pair), PAIR_INPUT))
)
_SYSTEM, _HISTORY, _TOOLS = "system", "history", "tools"
BESIDE = (_SYSTEM, _HISTORY, _TOOLS)
"""Fields that add to a dialogue: its system turn, pairs of earlier turns, and descriptions of tools."""
NEEDED = "messages, conversations, prompt and response or completion, instruction and output, or query and response"
UNREAD = ("functions", "chosen", "rejected")
"""Fields in which other programs keep parts of a dialogue. A record whose text is there is refused, because leaving it
out in silence would train on another dialogue."""
_UNREAD_IN_TURN = (
    "function_call", "reasoning_content", "reasoning", "thinking", "weight", "train", "loss", "refusal", "audio"
)  # fmt: skip
_SHAREGPT_ROLES = {
    "system": SYSTEM,
    "human": USER,
    "user": USER,
    "gpt": ASSISTANT,
    "assistant": ASSISTANT,
    "chatgpt": ASSISTANT,
    "tool": TOOL,
    "observation": TOOL,
}
_SHAREGPT_CALL = "function_call"


class Dialogue(NamedTuple):
    """The turns of a dialogue, and the tools that the assistant could call."""

    messages: list[Message]
    tools: list[dict[str, Any]]


def parse(record: dict[str, Any]) -> Dialogue:
    """The dialogue of a record, with cleaned contents and without blank turns. Raises DialogueError."""
    if record.get(MESSAGES) is not None:
        found, read = messages_of(record[MESSAGES]), {MESSAGES}
    elif record.get(CONVERSATIONS) is not None:
        found, read = _conversations(record[CONVERSATIONS]), {CONVERSATIONS}
    else:
        found, read = _pair(record)
    if says_something(system := record.get(_SYSTEM)):
        if found and found[0]["role"] == SYSTEM:
            raise DialogueError(
                f"has a text in the field {_SYSTEM!r} and a turn of the role system; remove one"
            )
        found.insert(0, {"role": SYSTEM, "content": _text(system, _SYSTEM)})
    tools = _tools(record.get(_TOOLS))
    read |= {_SYSTEM, _TOOLS}
    unread = [n for n in (*UNREAD, *BESIDE, *FIELDS) if n not in read and says_something(record.get(n))]
    if unread:
        raise DialogueError(
            f"has text in the field {unread[0]!r} beside {' and '.join(sorted(read - {_SYSTEM, _TOOLS}))}, which "
            f"would be left out; turn it into {MESSAGES}, or remove it"
        )
    cleaned = [
        {**message, "content": clean.clean(message["content"])} if "content" in message else message
        for message in found
    ]
    return Dialogue([m for m in cleaned if _is_kept(m)], tools)


def _is_kept(message: Message) -> bool:
    """Whether a turn says anything. That a tool gave nothing is a result, too."""
    return bool(message.get("content", "").strip()) or message["role"] == TOOL or "tool_calls" in message


def messages_of(value: Any, where: str = MESSAGES) -> list[Message]:
    """Check a list of turns in the form of OpenAI, and return the parts that a template may see.

    Raises DialogueError where a part would be left out, or is none that is known; it names the list `where`.
    """
    if not isinstance(value, list):
        raise DialogueError(f"has {type(value).__name__} in the field {where!r}, not a list")
    return [_message_of(turn, f"{where}[{number}]") for number, turn in enumerate(value)]


def _message_of(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict) or "role" not in turn or not ("content" in turn or turn.get("tool_calls")):
        raise DialogueError(f"has in {where} no role and content")
    role = SYSTEM if turn["role"] == "developer" else turn["role"]
    if role not in ROLES:
        raise DialogueError(f"has in {where} the role {turn['role']!r}; known are {', '.join(ROLES)}")
    unread = [name for name in _UNREAD_IN_TURN if says_something(turn.get(name))]
    unread += ["tool_calls"] if role != ASSISTANT and says_something(turn.get("tool_calls")) else []
    if unread:
        raise DialogueError(
            f"has {unread[0]!r} in {where}, which would be left out; remove it, or this record"
        )
    message: dict[str, Any] = {"role": role}
    given = turn.get("tool_calls") or []
    if not isinstance(given, list):
        raise DialogueError(f"has in {where} {type(given).__name__} as tool_calls, not a list")
    calls = [_call_of(call, where) for call in given]
    if not (calls and turn.get("content") is None):
        message["content"] = _text_of(turn.get("content"), where)
    if calls:
        message["tool_calls"] = calls
    if role == TOOL:
        message |= {name: turn[name] for name in ("name", "tool_call_id") if isinstance(turn.get(name), str)}
    return message


def _text_of(content: Any, where: str) -> str:
    """A content as text. Parts that are text are joined as paragraphs of one line."""
    if isinstance(content, list) and content:
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
            for part in content
        ]
        if all(isinstance(part, str) for part in parts):
            return "\n".join(map(str, parts))
        raise DialogueError(f"has in {where} a content with parts that are not text")
    if not isinstance(content, str):
        raise DialogueError(f"has in {where} {type(content).__name__} as content, not text")
    return content


def _call_of(call: Any, where: str) -> dict[str, Any]:
    """A tool call, with its arguments as an object: templates write them as JSON."""
    match call:
        case {"function": {"name": str(name), "arguments": arguments}} if name:
            pass
        case _:
            raise DialogueError(f"has in {where} a tool call without the name and arguments of a function")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise DialogueError(f"has in {where} a tool call whose arguments are no JSON object")
    found = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {**found, "id": call["id"]} if isinstance(call.get("id"), str) else found


def says_something(value: Any) -> bool:
    """Whether a field that is not read holds something: false for an empty value, and for a weight of 1."""
    return value not in (None, "", [], {}, 1) and not (isinstance(value, str) and not value.strip())


def _conversations(value: Any) -> list[Message]:
    """Turns in the form of ShareGPT: `from` and `value`; those in the form of OpenAI have this name as well."""
    if isinstance(value, list) and any(isinstance(turn, dict) and "role" in turn for turn in value):
        return messages_of(value, CONVERSATIONS)
    if not isinstance(value, list):
        raise DialogueError(f"has {type(value).__name__} in the field {CONVERSATIONS!r}, not a list")
    turns = []
    for number, turn in enumerate(value):
        where = f"{CONVERSATIONS}[{number}]"
        if not isinstance(turn, dict) or not isinstance(turn.get("from"), str) or "value" not in turn:
            raise DialogueError(f"has in {where} no from and value")
        content, extra = turn["value"], {name: turn[name] for name in _UNREAD_IN_TURN if name in turn}
        if turn["from"] == _SHAREGPT_CALL:
            turns.append({"role": ASSISTANT, "tool_calls": _calls(content, where), **extra})
        elif (role := _SHAREGPT_ROLES.get(turn["from"])) is None:
            known = ", ".join((*_SHAREGPT_ROLES, _SHAREGPT_CALL))
            raise DialogueError(f"has in {where} the role {turn['from']!r}; known are {known}")
        else:
            turns.append({"role": role, "content": content, **extra})
    return messages_of(turns, CONVERSATIONS)


def _calls(content: Any, where: str) -> list[dict[str, Any]]:
    """The tool calls of a ShareGPT turn, which are JSON text: one call or a list of them."""
    try:
        calls = json.loads(content)
    except (TypeError, ValueError, RecursionError):
        calls = None
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not calls:
        raise DialogueError(f"has in {where} a tool call that is no JSON object")
    return [{"function": call} for call in calls]


def _pair(record: dict[str, Any]) -> tuple[list[Message], set[str]]:
    """The dialogue of a record without messages, and the names of the fields that were read."""
    pair = next((pair for pair in PAIRS if all(record.get(name) is not None for name in pair)), None)
    if pair is None:
        names = ", ".join(map(str, list(record)[:8])) or "none"
        raise DialogueError(f"has no dialogue (its fields: {names}); needed are {NEEDED}")
    question, answer = (
        _turns(record[name], name, role) for name, role in zip(pair, (USER, ASSISTANT), strict=True)
    )
    read = {*pair, _HISTORY}
    if pair == _WITH_INPUT:
        read.add(PAIR_INPUT)
        given = record.get(PAIR_INPUT)
        if given is not None and _text(given, PAIR_INPUT).strip() and len(question) == 1:
            question = [{**question[0], "content": f"{question[0].get('content', '')}\n\n{given}"}]
    return [*_history(record.get(_HISTORY)), *question, *answer], read


def _turns(value: Any, name: str, role: str) -> list[Message]:
    """One side of a pair: a text, or turns in the form of OpenAI."""
    return (
        messages_of(value, name)
        if isinstance(value, list)
        else [{"role": role, "content": _text(value, name)}]
    )


def _history(value: Any) -> list[Message]:
    """Earlier pairs of a question and its answer."""
    found: list[Message] = []
    for number, pair in enumerate(
        value if isinstance(value, list) else [value] if says_something(value) else []
    ):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DialogueError(f"has in {_HISTORY}[{number}] no pair of a question and its answer")
        found += [{"role": USER, "content": pair[0]}, {"role": ASSISTANT, "content": pair[1]}]
    return found


def _tools(value: Any) -> list[dict[str, Any]]:
    """Descriptions of tools: a list of objects, or the JSON text of one."""
    if not says_something(value):
        return []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DialogueError(f"has in the field {_TOOLS!r} a text that is no JSON") from error
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DialogueError(f"has in the field {_TOOLS!r} no list of objects")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DialogueError(f"has {type(value).__name__} in the field {name!r}, not text")
    return value


def has_turn_of(messages: Sequence[Message], roles: Sequence[str]) -> bool:
    """Whether one of these roles says anything, so that there is something to learn."""
    return any(message["role"] in roles for message in messages)


def dump(dialogue: Dialogue) -> str:
    """The text that represents a dialogue; only equal dialogues have equal texts."""
    rows: list[Any] = [{_TOOLS: dialogue.tools}] if dialogue.tools else []
    for message in dialogue.messages:
        more = {key: value for key, value in message.items() if key not in ("role", "content")}
        rows.append([message["role"], message.get("content"), *([more] if more else [])])
    return json.dumps(rows, ensure_ascii=False, separators=(",", ":"))


def load(text: str) -> Dialogue:
    """The inverse of `dump`."""
    rows = json.loads(text)
    tools = rows.pop(0)[_TOOLS] if rows and isinstance(rows[0], dict) else []
    messages: list[Message] = []
    for role, content, *more in rows:
        turn = {"role": role} if content is None else {"role": role, "content": content}
        messages.append(turn | (more[0] if more else {}))
    return Dialogue(messages, tools)


def plain(messages: Sequence[Message]) -> str:
    """The contents, one after another, which count as the text of the dialogue."""
    return "\n".join(message["content"] for message in messages if "content" in message)
