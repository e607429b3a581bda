"""Renders chat templates, which are programs in Jinja that come with a model, in a process with limits.

The text is that of `apply_chat_template` in transformers: the same sandbox, filters, functions and `{% generation %}`
blocks. A template is untrusted. The sandbox gives it no way to code or files, and the process ends where it takes too
much time or memory, in whichever way it does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.errors import ConfigError
from pretrain.files import read_capped

CHAT_TEMPLATE_NAME = "chat_template.jinja"
"""File name of the template in a corpus, a run folder or an export."""
MAX_TEMPLATE_BYTES = 1 << 20
MAX_CPU_S = 2
"""CPU time limit of one rendering in seconds. A dialogue of 100,000 characters takes about 1 ms."""
MAX_MEMORY_BYTES = 1 << 30
MAX_RENDERED_CHARS = 1 << 25
_CONFIG_NAME = "tokenizer_config.json"
_MAX_CONFIG_BYTES = 16 << 20


def template_in(folder: Path) -> str | None:
    """The chat template in a folder: chat_template.jinja, or in tokenizer_config.json as older programs of Hugging Face
    wrote it; None where there is none. Raises ConfigError where it cannot be read."""
    path = folder / CHAT_TEMPLATE_NAME
    if path.is_file():
        return read_template(path)
    path = folder / _CONFIG_NAME
    if not path.is_file():
        return None
    try:
        found = json.loads(read_capped(path, _MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON; fix or remove it") from error
    template = found.get("chat_template") if isinstance(found, dict) else None
    if isinstance(template, list):  # several templates, with names
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
        if template is None:
            raise ConfigError(
                f"{path} has chat templates, but none with the name default; give chat.template=FILE"
            )
    if not isinstance(template, str | None):
        raise ConfigError(f"{path} has a chat_template that is no text; fix or remove it")
    return template


def read_template(path: Path) -> str:
    """The text of a chat template's file. Raises ConfigError."""
    try:
        return read_capped(path, MAX_TEMPLATE_BYTES).decode()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"the chat template {path} cannot be read: {reason}") from error


class DialogueError(ValueError):
    """A dialogue cannot be written in a template. The message continues a sentence that begins with its name."""


class Rendered(NamedTuple):
    """A dialogue as text."""

    text: str
    spans: list[tuple[int, int]]
    """Start and stop of what the template's `{% generation %}` blocks wrote; empty where it has none."""


class Renderer:
    """A chat template, rendered in a process of its own, which starts with the first rendering."""

    def __init__(self, template: str, variables: dict[str, str]) -> None:
        if len(template.encode("utf-8", "replace")) > MAX_TEMPLATE_BYTES:
            raise ConfigError(
                f"the chat template has more than {MAX_TEMPLATE_BYTES:,} bytes; give a smaller one"
            )
        self._template, self._variables = template, variables
        self._process: subprocess.Popen[bytes] | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        for_answer: bool = False,
        now: str | None = None,
    ) -> Rendered:
        """The text of a dialogue, with `for_answer` up to where the assistant's next turn begins.

        `now` is the current time in ISO format; where it is None, a template that asks for it refuses the dialogue.
        Raises DialogueError where the template refuses the dialogue, and ConfigError where the template is broken.
        """
        values = {
            **self._variables,
            "messages": messages,
            "tools": tools or None,
            "documents": None,
            "add_generation_prompt": for_answer,
        }
        answer = self._ask({"values": values, "now": now})
        if "refused" in answer:
            raise DialogueError(f"cannot be written in the chat template: {answer['refused']}")
        return Rendered(answer["text"], [(start, stop) for start, stop in answer["spans"]])

    def close(self) -> None:
        """End the process. A later rendering starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __del__(self) -> None:
        self.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """The answer of the process. Raises ConfigError where the template, and not the dialogue, is to blame."""
        if self._process is None:
            self._process = _start()
            self._exchange(self._template)
        return self._exchange(question)

    def _exchange(self, question: Any) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            problem = _problem_of(process.wait())
            self.close()
            raise ConfigError(f"the chat template is not used: the process that renders it {problem}")
        answer = json.loads(line)
        if "broken" in answer:
            self.close()
            raise ConfigError(f"the chat template is not used: {answer['broken']}")
        return answer


def _start() -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[2])
    return subprocess.Popen(
        (sys.executable, "-P", "-m", "pretrain.corpus.chat_sandbox"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": root, "PYTHONUTF8": "1"},
        start_new_session=True,  # Ctrl-C is for the process that asks, whose end also ends this one
    )


def _problem_of(returncode: int) -> str:
    if returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"took more than {MAX_CPU_S} s"
    return f"crashed (exit status {returncode})"
