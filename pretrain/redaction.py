"""Removes secrets from URLs and command lines before they are shown. Imports no torch.

Where a part may or may not be a secret, it is removed.

In a URL a secret may stand before an `@`, or after the first `?`, `#` or `;`; each of these may also be
percent-encoded. In a command line a secret is the value of an option whose name says so (`--token=...`,
`--api-key ...`), or of any environment variable (`NAME=...`).
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
    """The text with the user, password, query and fragment removed from its URLs."""
    return _URL.sub(lambda found: redact_url(found[0]), text)


def redact_url(url: str) -> str:
    """One URL without its user, password, query and fragment. It also handles URLs that a parser would reject."""
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
    """The words of a command line without values that may be secret.

    A word may itself be a shell command. `NAME=value`, as in `env WANDB_API_KEY=...`, keeps only the name.
    """
    shown, is_value = list[str](), False
    for word in words:
        shown.append(HIDDEN if is_value else _redact_word(word))
        # Whether the next word is this option's value. `_OPTION` requires a space, so one is added.
        is_value = not is_value and _secret_start(f"{word} ") == len(word) + 1
    return shown


def _redact_word(word: str) -> str:
    word = redact(word)
    start = _secret_start(word)
    return word if start is None else word[:start] + HIDDEN


def _secret_start(text: str) -> int | None:
    """Index of the first value that may be secret, or None; everything after that index is hidden too."""
    starts = [found.end() for found in _VARIABLE.finditer(text)]
    for pattern in (_ASSIGNED, _OPTION):
        starts += [found.end() for found in pattern.finditer(text) if _is_secret(found[1])]
    return min(starts, default=None)


def _is_secret(name: str) -> bool:
    """Whether an option's name marks its value as a secret. It compares whole words, so `max_tokens` is no secret."""
    parts = re.split(r"[\W_]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
    return any(part.endswith(_SECRET_ENDS) or part in _SECRET_WORDS for part in parts)
