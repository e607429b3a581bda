"""A dialogue with a model on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable

from pretrain.corpus.chat import ASSISTANT, USER, Message
from pretrain.corpus.chat_template import DialogueError
from pretrain.generation.writer import Writer
from pretrain.printing import say, visible


def converse(writer: Writer, trained_length: int, clean: Callable[[str], str]) -> None:
    """Read what the user says from stdin, line by line, and print the answers as they are generated.

    The oldest turns are left out where the dialogue grows longer than what the model was trained on.
    """
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401 - input() then lets the user edit the line
    say("type what the user says; an empty line or Ctrl-D ends the dialogue")
    turns: list[Message] = []
    while text := clean(_read_line("> " if is_terminal else "")).strip():
        turns.append({"role": USER, "content": text})
        try:
            turns = _that_fit(writer, turns, trained_length)
        except DialogueError as error:
            say(f"error: the dialogue {error}")
            turns.pop()
            continue
        (answer,) = writer.write([writer.answer_to(turns)], on_text=_show)
        print("" if answer.ending == "stop" else " …", flush=True)
        turns.append({"role": ASSISTANT, "content": answer.text})


def _that_fit(writer: Writer, turns: list[Message], trained_length: int) -> list[Message]:
    """The newest turns, from one of the user's on, that leave room for the answer."""
    kept = turns
    while len(kept) > 1 and len(writer.answer_to(kept).tokens) + writer.max_new_tokens > trained_length:
        kept = kept[2:]
    if len(kept) < len(turns):
        say(
            f"note: the oldest {len(turns) - len(kept)} turns are left out; the model knows {trained_length} tokens"
        )
    return kept


def _read_line(prompt: str) -> str:
    try:
        return input(prompt)
    except EOFError:
        return ""


def _show(piece: str) -> bool:
    print(visible(piece, keep="\n\t"), end="", flush=True)
    return True
