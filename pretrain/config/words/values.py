"""Reads the value of one key from its text on the command line. The kind of the key decides how."""

from __future__ import annotations

import re
from typing import Any

from pretrain.config.words.kinds import Kind, kind_of, kinds_of
from pretrain.errors import ConfigError

_ANY = kind_of(Any)
_PAIRS = {"[": "]", "{": "}"}
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
"""A text in quotes. A backslash before a quote, and before the backslashes that stand before one, is not part of it."""


def read_value(key: str, text: str, kind: Kind) -> Any:
    """The value of `key` that `text` stands for. Numbers, words and the like stay text; `build` converts them.

    The value of a text key is `text` as it stands, without the quotes around all of it, if there are any: they were
    needed when Hydra's grammar read it. Raises ConfigError for brackets that do not fit.
    """
    if kind.optional and text.lower() == "null":
        return None
    if kind.type is str:
        return unquoted(text)
    bare = text.strip()
    # A path may begin with a bracket, but a list that somebody has not closed is more common.
    if bare[:1] in _PAIRS and (not kind.holds_text or bare.endswith("]") or "]" not in bare):
        return _Reader(key, bare).whole(kind)
    if kind.is_list and kind.item.type is str:
        return [unquoted(text)] if bare else []
    return _guessed(bare) if kind.type is Any else unquoted(bare)


def unquoted(text: str) -> str:
    """The text without the quotes around it, or as it is where they do not enclose all of it."""
    if _QUOTED.fullmatch(text) is None:
        return text
    before_quote = rf"(\\+)(?={text[0]}|\Z)"
    return re.sub(before_quote, lambda match: match[1][: len(match[1]) // 2], text[1:-1])


def _guessed(text: str) -> Any:
    """The value of a text whose kind is not known: a number, true, false, null, or the text without quotes."""
    known = {"true": True, "false": False, "null": None}
    if text.lower() in known:
        return known[text.lower()]
    if re.fullmatch(r"[+-]?\d+(_\d+)*", text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        return unquoted(text)


class _Reader:
    """Reads lists and maps in brackets: [A, B], {KEY: VALUE, ...}, one inside the other."""

    def __init__(self, key: str, text: str) -> None:
        self._key = key
        self._text = text
        self._at = 0

    def whole(self, kind: Kind) -> Any:
        """The value of all of the text."""
        value = self._value(kind, "")
        if self._at < len(self._text):
            raise self._wrong(f"has {self._text[self._at :]!r} after its end")
        return value

    def _value(self, kind: Kind, ends: str) -> Any:
        self._skip_blanks()
        opening = self._text[self._at : self._at + 1]
        if opening == "[" and kind.type is not str:
            return self._list(kind)
        if opening == "{" and kind.type is not str:
            return self._map(kind)
        text = self._scalar(ends)
        if kind.optional and text.lower() == "null":
            return None
        return _guessed(text) if kind.type is Any else unquoted(text)

    def _list(self, kind: Kind) -> list[Any]:
        item = kind.item if kind.is_list else _ANY
        found: list[Any] = []
        self._at += 1
        while not self._ended("]"):
            found.append(self._value(item, ",]"))
            self._skip_comma("]")
        return found

    def _map(self, kind: Kind) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self._at += 1
        while not self._ended("}"):
            name = unquoted(self._scalar(":,}"))
            if self._text[self._at : self._at + 1] != ":":
                raise self._wrong(f"has no value for {name}; write {{{name}: VALUE}}")
            self._at += 1
            found[name] = self._value(_kind_in(kind, name), ",}")
            self._skip_comma("}")
        return found

    def _ended(self, closing: str) -> bool:
        """Whether the closing bracket is next, which is then passed over."""
        self._skip_blanks()
        if self._at >= len(self._text):
            raise self._wrong(f"has no closing {closing}")
        if self._text[self._at] != closing:
            return False
        self._at += 1
        return True

    def _skip_comma(self, closing: str) -> None:
        self._skip_blanks()
        if self._at < len(self._text) and self._text[self._at] == ",":
            self._at += 1
        elif self._at < len(self._text) and self._text[self._at] != closing:
            raise self._wrong(
                f"has {self._text[self._at]!r} where a comma or {closing} belongs; put a text with brackets in quotes"
            )

    def _scalar(self, ends: str) -> str:
        """The text up to one of the characters `ends` that is in no quotes and in no brackets of its own."""
        start, depth = self._at, 0
        quoted = _QUOTED.match(self._text, start)
        if quoted and (self._text[quoted.end() :].lstrip() or " ")[0] in ends:
            self._at = quoted.end()
            self._skip_blanks()
            return quoted[0]
        while self._at < len(self._text):
            character = self._text[self._at]
            if depth == 0 and character in ends:
                break
            depth += (character in _PAIRS) - (character in _PAIRS.values())
            self._at += 1
        return self._text[start : self._at].strip()

    def _skip_blanks(self) -> None:
        while self._text[self._at : self._at + 1].isspace():
            self._at += 1

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(f"{self._key}={self._text} {what}")


def _kind_in(kind: Kind, name: str) -> Kind:
    """The kind of one value of a map. A key that the schema does not have is refused later."""
    if kind.is_group:
        return kinds_of(kind.type).get(name, _ANY)
    return kind.item if kind.is_map else _ANY
