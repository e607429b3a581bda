"""What is shown of URLs and command lines: where, but no secret. In doubt too much is left out. Imports no torch.

In a URL a secret may stand before an `@`, or behind the first `?`, `#` or `;`, each of which may also be written with
percent signs. In a command line it is the value of a name that says so (`--token=...`, `--api-key ...`), or of any
variable of the environment (`NAME=...`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

HIDDEN = "***"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?:://|%(?:25)*3a(?:/|%(?:25)*2f){2}|:(?:%(?:25)*2f){2})\S*", re.I)
_SEPARATOR = re.compile(r"://|%(?:25)*3a(?:/|%(?:25)*2f){2}|:(?:%(?:25)*2f){2}", re.I)
_AT = re.compile(r"@|%(?:25)*40", re.I)
_BEHIND = re.compile(r"[?#;]|%(?:25)*(?:3f|23|3b)", re.I)

_SECRET_ENDS = (
    "token", "secret", "secrets", "password", "passwd", "passphrase", "key", "credential", "credentials", "cookie",
    "signature",
)  # fmt: skip
_SECRET_WORDS = {"pwd", "pw", "auth", "authorization", "sig", "login"}
_VARIABLE = re.compile(r"(?<![\w.-])[A-Z_][A-Z0-9_]*=")
_ASSIGNED = re.compile(r"([\w.-]+)[\"']?\s*(?:=|:(?!//))")
_OPTION = re.compile(r"(?<!\S)-{1,2}([\w.-]+)\s+")


def redact(text: str) -> str:
    """A text without what its URLs hold of user, password, query and fragment."""
    return _URL.sub(lambda found: redact_url(found[0]), text)


def redact_url(url: str) -> str:
    """One URL without user, password, query and fragment, also where it is none that a parser would take."""
    separator = _SEPARATOR.search(url)
    if separator is None:
        return url
    scheme, rest = url[: separator.start()], url[separator.end() :]
    ats, behind = list(_AT.finditer(rest)), _BEHIND.search(rest)
    if ats and behind and behind.start() < ats[-1].start():  # a password with a `?`, or a query with an `@`
        return f"{scheme}://{HIDDEN}"
    shown = rest[: behind.start()] + behind[0] + HIDDEN if behind else rest
    return f"{scheme}://{HIDDEN}@{shown[ats[-1].end() :]}" if ats else f"{scheme}://{shown}"


def redact_command(words: Iterable[str]) -> list[str]:
    """The words of a command, also those of a shell within one of them, without values that may be secret.

    Of `NAME=value`, as in `env WANDB_API_KEY=...`, only the name is left.
    """
    shown, is_value = list[str](), False
    for word in words:
        shown.append(HIDDEN if is_value else _redact_word(word))
        # A value of its own follows: `_OPTION` wants a space.
        is_value = not is_value and _secret_start(f"{word} ") == len(word) + 1
    return shown


def _redact_word(word: str) -> str:
    word = redact(word)
    start = _secret_start(word)
    return word if start is None else word[:start] + HIDDEN


def _secret_start(text: str) -> int | None:
    """Where the first value begins that may be secret; all behind it is left out as well."""
    starts = [found.end() for found in _VARIABLE.finditer(text)]
    for pattern in (_ASSIGNED, _OPTION):
        starts += [found.end() for found in pattern.finditer(text) if _is_secret(found[1])]
    return min(starts, default=None)


def _is_secret(name: str) -> bool:
    """Whether a name says that its value is a secret: by a whole word of it, so that `max_tokens` is none."""
    parts = re.split(r"[\W_]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
    return any(part.endswith(_SECRET_ENDS) or part in _SECRET_WORDS for part in parts)
