"""Renders one chat template in this process, which `pretrain.corpus.chat_template` starts: its limits are set here.

It reads JSON lines: the template, then a question for each rendering; and writes an answer to each line.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pretrain.corpus.chat_template import MAX_CPU_S, MAX_MEMORY_BYTES, MAX_RENDERED_CHARS, Rendered

_GIB = 1 << 30


class Generation(Extension):
    """`{% generation %}` blocks, which say what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012  as Jinja declares it
    marks: tuple[str, str] | None = None
    """Texts that no dialogue holds, to put around what a block writes; None puts nothing."""
    is_used = False

    def parse(self, parser: Any) -> Any:
        self.is_used = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: Any) -> str:
        written = caller()
        return written if self.marks is None else written.join(self.marks)


class Dictionary:
    """`dict` without its attributes."""

    def __call__(self, *arguments: Any, **values: Any) -> dict[Any, Any]:
        return dict(*arguments, **values)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


class Namespace(jinja2.utils.Namespace):
    """`namespace` without names of Python's internals."""

    def __init__(*arguments: Any, **values: Any) -> None:
        itself, *others = arguments
        attributes = dict(*others, **values)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(itself, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"it stores {name!r} in a namespace")


class Clock:
    """What a template sees as the current time, in ISO format; where it is None, it may not ask."""

    now: str | None = None

    def strftime(self, format: str) -> str:
        if self.now is None:
            raise jinja2.TemplateError(
                "it writes the current date, so that the same input would give other tokens on another day; "
                "state the date with chat.date=YYYY-MM-DD"
            )
        return datetime.fromisoformat(self.now).strftime(format)


def raise_exception(message: str) -> None:
    """Refuse the dialogue, for a reason that the template states."""
    raise jinja2.TemplateError(message)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would write signs of HTML as escapes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class Template:
    """A compiled template, in the environment that transformers gives it. Raises jinja2.TemplateError, and others."""

    def __init__(self, source: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        self._clock = Clock()
        environment.filters["tojson"] = tojson
        environment.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": self._clock.strftime,
            "dict": Dictionary(),
            "namespace": Namespace,
        }
        self._generation: Generation = environment.extensions[Generation.identifier]  # type: ignore[assignment]
        self._template = environment.from_string(source)

    def render(self, values: dict[str, Any], now: str | None) -> Rendered:
        """Render the template. Raises jinja2.TemplateError and, from the template's own mistakes, any other."""
        self._clock.now, self._generation.marks = now, None
        text = _text(self._template.generate(values))
        if not self._generation.is_used:
            return Rendered(text, [])
        nonce = int.from_bytes(os.urandom(12), "big")
        self._generation.marks = start_mark, stop_mark = f"\x01{nonce}\x02", f"\x01{nonce}\x03"
        spans, plain, start = [], "", 0
        for piece in re.split(f"({start_mark}|{stop_mark})", _text(self._template.generate(values))):
            if piece == start_mark:
                start = len(plain)
            elif piece == stop_mark:
                spans.append((start, len(plain)))
            else:
                plain += piece
        if plain != text:
            raise ValueError("what its generation blocks write is changed afterward")
        return Rendered(text, [(start, stop) for start, stop in spans if stop > start])


def _text(pieces: Iterator[str]) -> str:
    found, n_chars = [], 0
    for piece in pieces:
        found.append(piece)
        n_chars += len(piece)
        if n_chars > MAX_RENDERED_CHARS:
            raise MemoryError
    return "".join(found)


def _answers(lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    """The answer to each line: first the template, then what to render."""
    try:
        template = Template(json.loads(next(lines)))
    except (jinja2.TemplateError, RecursionError, ValueError, OverflowError, MemoryError) as error:
        yield {"broken": f"it is no valid Jinja template ({_said(error)})"}
        return
    yield {}
    for line in lines:
        question = json.loads(line)
        _limit_time()
        try:
            text, spans = template.render(question["values"], question["now"])
            yield {"text": text, "spans": spans}
        except MemoryError:
            yield {
                "broken": f"it takes more than {MAX_MEMORY_BYTES / _GIB:g} GiB or {MAX_RENDERED_CHARS:,} characters"
            }
        except Exception as error:  # a template can raise anything
            yield {"refused": _said(error)}


def _said(error: BaseException) -> str:
    said = " ".join(str(error).split())[:300]
    return said if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: {said}"


def _limit_time() -> None:
    import resource

    used_s, (_, hard) = math.ceil(time.process_time()), resource.getrlimit(resource.RLIMIT_CPU)
    soft = used_s + MAX_CPU_S
    resource.setrlimit(
        resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard)
    )


def _main() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_time()
    for answer in _answers(iter(sys.stdin.buffer.readline, b"")):
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _main()
