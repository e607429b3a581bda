"""Escapes text from untrusted sources, so that a terminal or a log shows it instead of acting on it.

Names, ids, licenses, keys and model output may contain characters that move the cursor, hide or reorder other text, or
start a line that looks like one of this program's. Letters of all scripts stay as they are.
"""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Sequence

# Control characters (C0, DEL, C1), line and paragraph separators, characters that override the text direction, and lone
# surrogates, which no output can encode.
_HARMFUL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_CELL_CHARS = 200
_MARKDOWN_CHARS = 10_000
_MARKUP = re.compile(r"([\\`*_\[\]|~$])")  # brackets would make links and images
_BLOCK = re.compile(r"^(\d*)(?=[#+=-]|[.)](?:\s|$))")  # signs that would begin a heading or a list
ERROR_CHARS = 10_000
"""Number of characters of an error's text that are shown. It may quote the content of a file."""


def visible(text: str, keep: str = "", limit: int | None = None) -> str:
    """`text` on one line, with harmful characters escaped as in JSON, such as \\u001b.

    Characters in `keep`, such as the line breaks of a multi-line text, are not escaped. A text longer than `limit`
    characters is truncated.
    """
    if limit is not None and len(text) > limit:
        text = text[:limit] + "…"
    return _HARMFUL.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), text)


def _escape(character: str) -> str:
    return _NAMED.get(character) or f"\\u{ord(character):04x}"


def print_error(kind: str, error: BaseException | str) -> None:
    """Print a line on stderr: `kind`, a colon, and the error, escaped because it may quote the content of a file."""
    print(f"{kind}: {visible(str(error), limit=ERROR_CHARS)}", file=sys.stderr, flush=True)


def say(line: str) -> None:
    """Print a line on stderr, with harmful characters escaped. A closed stderr is ignored."""
    line = visible(line)
    try:
        if sys.stderr.isatty():
            from rich.console import Console

            Console(stderr=True).print(line, markup=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):  # the terminal or the reader of the pipe is gone
        pass


# ---- Markdown --------------------------------------------------------------------------------------------------------


def shown(text: str) -> str:
    """An untrusted name, made safe for the terminal and for a cell of a table."""
    return visible(text, limit=_CELL_CHARS)


def markdown(text: str) -> str:
    """Untrusted text as one line of Markdown that displays it: no tag, no link, no cell border takes effect."""
    line = visible(" ".join(text.split()), limit=_MARKDOWN_CHARS)
    escaped = html.escape(_MARKUP.sub(r"\\\1", line), quote=False)
    return _BLOCK.sub(r"\1\\", escaped)


def code_span(text: str) -> str:
    """Untrusted text as inline code, in which only a backtick has a meaning."""
    return "`" + shown(" ".join(text.split())).replace("`", "'").replace("|", "\\|") + "`"


def code_block(text: str) -> str:
    """Lines as a block of code, whose fence is longer than any run of backticks in them."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{visible(text, keep=chr(10))}\n{fence}"


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the cells are Markdown already."""
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
