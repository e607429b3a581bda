"""Text that others wrote, as a terminal or a log can show it without obeying it.

Names, ids, licenses, keys and the text of models may hold what moves a cursor, hides or reorders other text, or begins
a line that looks like one of this program. Letters of any script stay as they are.
"""

from __future__ import annotations

import re
import sys

# Controls (C0, DEL, C1), line and paragraph separators, what overrides the direction of text, and halves of surrogate
# pairs, which no output can encode.
_HARMFUL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
ERROR_CHARS = 10_000
"""Of the text of an error, which may quote what a file holds."""


def visible(text: str, keep: str = "", limit: int | None = None) -> str:
    """`text` on one line, harmful characters written as \\u001b or the like, as JSON would write them.

    Those in `keep` stay, such as line breaks in a text of many lines. Beyond `limit` characters the text is cut.
    """
    if limit is not None and len(text) > limit:
        text = text[:limit] + "…"
    return _HARMFUL.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), text)


def _escape(character: str) -> str:
    return _NAMED.get(character) or f"\\u{ord(character):04x}"


def print_error(kind: str, error: BaseException | str) -> None:
    """A line on stderr: `kind` and what was wrong, which may quote what a file holds."""
    print(f"{kind}: {visible(str(error), limit=ERROR_CHARS)}", file=sys.stderr, flush=True)


def say(line: str) -> None:
    """One line on stderr, whatever state stderr is in; what it quotes of events and logs is made visible."""
    line = visible(line)
    try:
        if sys.stderr.isatty():
            from rich.console import Console

            Console(stderr=True).print(line, markup=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):  # the terminal or the reader of the pipe is gone
        pass
