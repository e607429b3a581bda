"""Judges whether a value is a secret: chance made it, or it has the form of one, and it is no example."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections import Counter

_NOT_SECRET = re.compile(
    r"example|(?<![A-Za-z])your|xxxx|\*\*\*|placeholder|changeme|dummy|redacted|<|\.\.\.|123456789|abcdefgh"
    r"|replace|insert|change_?me|goes_?here|must",
    re.IGNORECASE,
)
_VARIABLE = re.compile(
    r"\\|[\^~=]?[0-9]+(?:\.[0-9]+)+\Z|0x[0-9A-Fa-f]{1,16}\Z|[*&][A-Za-z]\w*\Z|[$%#]?\{|[$%]\(|[$%]\w+[$%]?\Z|<|.*\{\{|.*\$\{|[\w.$:>-]*[(\[]"
)
_PIECES = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+")
_JUDGED_CHARS = 128
_MAX_EQUAL_SIGNS = 6  # more are a list of assignments
_SIGNS = re.compile(r"[-_.~:/+=|]")
# Pairs and runs of letters that words do not have.
_ODD_LETTERS = re.compile(
    "q[a-tv-z]|[jvz][bcdfgjkmpqtvxz]|w[cgjmqvxz]|x[bdfgjkmqvxz]|[bcdfghjkmpqtvwxz][jqxz]|[bcdfghjklmnpqrstvwxz]{5}"
)
_CAMEL_WORD = re.compile("[A-Z][a-z]{4,}")
_FILE = re.compile(r".*\.(?:[a-z]{2,4}|tar\.gz|[a-z]{1,3}[0-9])")


def entropy(value: str) -> float:
    """Bits per character by the counts of the characters."""
    counts = Counter(value)
    return -sum(n / len(value) * math.log2(n / len(value)) for n in counts.values())


def is_key(value: str) -> bool:
    """Whether what has the form of a key is one and not an example."""
    body = re.sub(r"[-_.~:/]", "", value)
    return not _NOT_SECRET.search(value) and entropy(body) >= 3


def has_short_pieces(value: str, longest: float = 3.6) -> bool:
    """Whether letters, capitals and digits change as often as chance makes them, unlike in `sk-cube-grid-spinner`."""
    pieces = _PIECES.findall(value)
    return len(pieces) > 2 and sum(map(len, pieces)) / len(pieces) < longest


def has_odd_letters(value: str) -> bool:
    """Whether letters follow each other as in no word, twice."""
    return len(_ODD_LETTERS.findall(value.lower())) > 1


def _is_by_chance(value: str, longest: float) -> bool:
    return has_short_pieces(value, longest) or (has_short_pieces(value, 4) and has_odd_letters(value))


def is_random(value: str) -> bool:
    """Whether an assigned value is a key: its letters and digits mix like chance, in all or in one part of it."""
    if len(value) < 16 or _NOT_SECRET.search(value) or _FILE.fullmatch(value):
        return False
    if sum(map(len, _CAMEL_WORD.findall(value))) > 0.5 * len(value):
        return False  # Qwen2OmniToken2WavModel
    parts = _SIGNS.split(value)
    joined = "".join(parts)
    # Capitals and small letters that change all the time need no digit.
    if len(joined) >= 14 and entropy(joined) >= 3.2 and has_short_pieces(joined, longest=2.3):
        return True
    longest = joined if len(value) >= 32 and entropy(value) >= 4.2 else max(parts, key=len)
    digits = sum(map(str.isdigit, longest))
    if len(longest) < 12 or digits == len(longest) or entropy(longest) < 2.8:
        return False
    if not has_short_pieces(longest):
        return digits > 1 and has_odd_letters(longest)
    return digits >= 1 + (len(longest) < 24) or has_odd_letters(longest)


def is_hexadecimal(value: str) -> bool:
    """Whether a value is a key in hexadecimal digits, whose letters and digits may come in long runs; or a UUID."""
    is_form = re.fullmatch(
        r"[0-9a-f]{32,128}|[0-9A-F]{32,128}|[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
        value,
    )
    return bool(is_form) and entropy(value) >= 3 and not _NOT_SECRET.search(value)


def is_generated(value: str) -> bool:
    """Whether a quoted value is a long mixture of letters, digits and signs, such as Django's secret key."""
    is_mixed = len(set(re.findall(r"[!@#$%^&*()+]", value))) > 1 and any(map(str.isdigit, value))
    return is_mixed and len(value) >= 32 and entropy(value) >= 4 and not _NOT_SECRET.search(value)


def is_login(value: str) -> bool:
    """Whether a value is `name:password` in base64, as HTTP and the files of Docker and npm have it."""
    if len(value) < 12 or len(value) % 4 or not re.fullmatch(r"[A-Za-z0-9+/]+={0,2}", value):
        return False
    try:
        name, colon, password = base64.b64decode(value).partition(b":")
    except binascii.Error:  # a single letter in the last group of four
        return False
    return bool(colon) and name.isascii() and name.isalnum() and len(password) > 3


def is_key_text(value: str, is_quoted: bool) -> bool:
    """Whether a value given to the name of a key is one. Of a long one the beginning tells."""
    value = value[:_JUDGED_CHARS]
    if value.startswith(("$", "{", "<", "%(", "(?")) or value.count("=") > _MAX_EQUAL_SIGNS:
        return False
    return is_random(value) or is_hexadecimal(value) or is_login(value) or (is_quoted and is_generated(value))


def is_password(value: str, is_quoted: bool) -> bool:
    """Whether a value given to a password is one: it mixes kinds of characters and is no name or expression."""
    value = value[:_JUDGED_CHARS]
    if _NOT_SECRET.search(value) or _VARIABLE.match(value) or value.endswith((")", "]", "}")):
        return False
    kinds = sum(
        bool(re.search(kind, value)) for kind in ("[a-z]", "[A-Z]", "[0-9]", r"[!@#$%^&*?+=~|:;,(){}]")
    )
    is_named = re.fullmatch(r"[A-Za-z_]+[0-9]{0,3}(?:[-_.:=][A-Za-z0-9]{1,12})+", value)
    if is_named and (len(value) < 8 or not _is_by_chance(value, longest=2.5)):
        return False  # a name: scram-sha-256
    letters = value.replace(" ", "")  # abcd efgh ijkl mnop
    if letters.isalpha():
        is_mixed = not letters.islower() and has_short_pieces(
            letters, longest=3 if len(letters) >= 10 else 2.6
        )
        return len(letters) >= 8 and (is_mixed or (len(letters) >= 12 and has_odd_letters(letters)))
    if is_quoted:
        return kinds >= 2 and not re.fullmatch(r"[A-Za-z_.:/ -]+", value)
    if re.fullmatch(r"[A-Za-z_.]+[0-9]{0,2}[,;.]?", value):  # a name: password1
        return _is_by_chance(value, longest=3)
    return kinds >= 3 or (kinds == 2 and len(value) >= 8 and sum(map(str.isdigit, value)) >= 2)
