"""Tables as aligned text and as Markdown, with untrusted names made safe to print in both."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from pretrain.printing import visible

_CELL_CHARS = 200
_MARKDOWN_CHARS = 10_000
_MARKUP = re.compile(r"([\\`*_\[\]|~$])")  # brackets would make links and images
_BLOCK = re.compile(r"^(\d*)(?=[#+=-]|[.)](?:\s|$))")  # signs that would begin a heading or a list


def shown(text: str) -> str:
    """An untrusted name, made safe for the terminal and for a cell of a table."""
    return visible(text, limit=_CELL_CHARS)


def plain_table(rows: Sequence[tuple[str, ...]], headers: Sequence[str]) -> str:
    """A table as text with aligned columns."""
    from rich.cells import cell_len, set_cell_size  # a Chinese character is two columns wide

    table = [tuple(headers), *(tuple(map(shown, row)) for row in rows)]
    widths = [max(cell_len(row[column]) for row in table) for column in range(len(headers))]
    return "\n".join(
        "  ".join(set_cell_size(cell, w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


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
