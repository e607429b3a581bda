"""What the finders share: the pieces of text worth a closer look, what is reported, and the placeholders.

A placeholder never counts as personal data itself, so that a second run changes nothing: it comes from ranges reserved
for examples (RFC 2606, 3849, 5737; 555-01xx of the North American plan) or is not a valid number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class PiiMatch(NamedTuple):
    """A piece of text to be replaced."""

    start: int
    end: int
    kind: str
    form: str
    """The kind of placeholder that fits."""
    value: str
    """The number or address in one form, the same for all of its spellings."""


def spans_around(signs: Iterable[int], before: int, after: int) -> Iterator[tuple[int, int]]:
    """The text around the signs, which are in order, as spans that do not overlap: nothing is searched twice."""
    start = end = -1
    for sign in signs:
        if sign - before > end:
            if end >= 0:
                yield start, end
            start = max(0, sign - before)
        end = sign + after
    if end >= 0:
        yield start, end


def places(text: str, literal: str) -> Iterator[int]:
    """Where a literal stands in the text."""
    at = text.find(literal)
    while at >= 0:
        yield at
        at = text.find(literal, at + 1)


_NAMES = (
    "alex anna ben carla chen daniel emma eric fang grace hannah ivan jack jing julia kate lee lena li maria "
    "mei michael nina oscar paul rosa sam sara tom wang wei zhang"
).split()


def placeholder(form: str, value: str, salt: bytes) -> str:
    """The placeholder of a value: the same for all of its spellings, on every machine and in any order."""
    digest = hashlib.blake2b(salt + b"\0" + value.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    number = int.from_bytes(digest, "big")
    match form:
        case "email":
            return f"{_NAMES[number % 32]}@example.{('com', 'net', 'org')[number // 32 % 3]}"
        case "ipv4":
            return f"{('192.0.2', '198.51.100', '203.0.113')[number % 3]}.{1 + number // 3 % 254}"
        case "ipv6":
            return f"2001:db8::{1 + number % 0xFFFE:x}"
        case "mobile" | "mobile +86":
            return f"{'+86 ' if form == 'mobile +86' else ''}1380000{number % 10_000:04}"
        case "landline":  # no local number begins with 0
            return f"010-0000{number % 10_000:04}"
        case "north american" | "international":
            return f"{'+1 ' if form == 'international' else ''}202-555-01{number % 100:02}"
        case "id_number":  # as of a person born in 1800
            body = f"11010118000101{number % 1000:03}"
            return body + id_check_digit(body)
        case "national_id":  # no country has this form
            return f"ID-{number % 1_000_000:06}"
        case "bank_card":  # the number that card networks publish for tests
            return "4111 1111 1111 1111"
        case fixed:
            return fixed


def id_check_digit(body: str) -> str:
    """The 18th character for the first 17 digits of a Chinese identity number (GB 11643-1999, ISO 7064 MOD 11-2)."""
    total = sum(int(digit) * pow(2, 17 - at, 11) for at, digit in enumerate(body))
    return "10X98765432"[total % 11]
