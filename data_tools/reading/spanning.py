"""Splits files whose records may span lines: JSON values, alone or in an array, and rows of CSV.

Every record is bounded before memory is allocated for it. Raises only OSError and ValueError.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from enum import Enum
from typing import IO, Any, NamedTuple

from data_tools.reading.bounded import CutOffError, Line, lines

_PIECE_BYTES = 1 << 20
_MARK = b"\xef\xbb\xbf"  # the byte-order mark of UTF-8
_GAP = re.compile(rb"[ \t\r\n,]*+")
_BRACKET = re.compile(rb'["{}\[\]]')
_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.S)
_LITERAL = re.compile(rb"[^ \t\r\n,\]}]*+")
_QUOTE = re.compile(b'"')
_MANY_VALUES = 500_000
_ANY_SIZE = (1 << 31) - 1  # the largest limit that csv takes on every system
_HALF = re.compile("[\udc80-\udcff]")  # a byte that is not UTF-8


# ---- JSON ------------------------------------------------------------------------------------------------------------


class JsonForm(Enum):
    lines = "an object per line"
    items = "an array"
    values = "one or several objects, which may span lines"


def json_form(head: bytes, file: IO[bytes], max_bytes: int) -> JsonForm:
    """The form of a file of JSON that begins with `head`. Reads two lines of it at most."""
    begin = head.removeprefix(_MARK).lstrip()[:1]
    if begin == b"[":
        return JsonForm.items
    found = _until_damage(lines(file, max_bytes))
    first = next(found, None)
    if begin != b"{" or first is None or first.content is None:
        return JsonForm.lines
    try:
        first.json()
    except ValueError:
        second = next(found, None)  # after a line that is broken, or after the first one of a longer object
        is_next = second is not None and second.content is not None and second.content.startswith(b'{"')
    else:
        is_next = next(found, None) is not None
    return JsonForm.lines if is_next else JsonForm.values


def _until_damage(found: Iterator[Line]) -> Iterator[Line]:
    try:
        yield from found
    except OSError:  # reading the records will come to this place again
        return


def json_values(file: Any, max_bytes: int) -> Iterator[Line]:
    """The JSON values of a file: the items of an array, or one or several values that follow each other.

    The values are not parsed; only their ends are looked for. Raises CutOffError where the file ends within a value or
    an array, and ValueError where something follows the array.
    """
    scanner = _Scanner(max_bytes)
    while piece := file.read1(_PIECE_BYTES):  # the last piece before damage is not lost
        yield from scanner.feed(piece)
    yield from scanner.finish()


class _Scanner:
    """Finds the ends of JSON values in pieces of a file."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._offset = 0  # of the current piece in the file
        self._number = 0
        self._is_array: bool | None = None  # known after the first sign
        self._is_closed = False
        self._depth = 0
        self._inside: re.Pattern[bytes] | None = None  # what the current position is in; None between values
        self._is_escaped = False  # the last piece ended with a backslash
        self._begin = 0
        self._parts: list[bytes] = []
        self._n_bytes = 0

    def feed(self, piece: bytes) -> Iterator[Line]:
        """The values that end in the next piece."""
        if not self._offset:
            piece = piece.replace(_MARK, b"   ", 1) if piece.startswith(_MARK) else piece
        at = begin = 0
        while at < len(piece):
            if self._inside is None:
                if (at := self._skip_gap(piece, at)) == len(piece):
                    break
                begin, self._begin = at, self._offset + at
            at = self._advance(piece, at)
            if self._inside is None:
                self._take(piece[begin:at])
                yield self._line(self._offset + at)
        if self._inside is not None:
            self._take(piece[begin:])
        self._offset += len(piece)

    def finish(self) -> Iterator[Line]:
        """The last value, where only the end of the file ends it."""
        if self._inside is _LITERAL and not self._is_array:
            self._inside = None
            yield self._line(self._offset)
        if self._inside is not None:
            raise CutOffError("the file ends within a JSON value")
        if self._is_array and not self._is_closed:
            raise CutOffError("the file ends within a JSON array")

    def _skip_gap(self, piece: bytes, at: int) -> int:
        """Skip to the beginning of the next value, and begin it."""
        while (at := _GAP.match(piece, at).end()) < len(piece):  # type: ignore[union-attr]  # it matches anything
            sign = piece[at : at + 1]
            if self._is_closed:
                raise ValueError(f"something follows the JSON array, at byte {self._offset + at}")
            if self._is_array is None:
                self._is_array = sign == b"["
                if self._is_array:
                    at += 1
                    continue
            if sign == b"]" and self._is_array:
                self._is_closed = True
                at += 1
                continue
            if sign in (b"]", b"}", b":"):
                raise ValueError(f"it is no JSON at byte {self._offset + at}")
            self._inside = _BRACKET if sign in (b"{", b"[", b'"') else _LITERAL
            break
        return at

    def _advance(self, piece: bytes, at: int) -> int:
        """Move on within a value, at most to its end, and note what the new position is in."""
        if self._inside is _LITERAL:
            end = _LITERAL.match(piece, at).end()  # type: ignore[union-attr]
            if end < len(piece):
                self._inside = None
            return end
        if self._inside is _STRING:
            at += self._is_escaped
            self._is_escaped = False
            at = _STRING.match(piece, at).end()  # type: ignore[union-attr]
            if at >= len(piece):
                return at
            self._is_escaped = piece[at : at + 1] == b"\\"  # it is the last byte of the piece
            if not self._is_escaped:
                self._inside = _BRACKET if self._depth else None
            return at + 1
        found = _BRACKET.search(piece, at)
        if found is None:
            return len(piece)
        if found[0] == b'"':
            self._inside = _STRING
        else:
            self._depth += 1 if found[0] in (b"{", b"[") else -1
            self._inside = _BRACKET if self._depth else None
        return found.end()

    def _take(self, part: bytes) -> None:
        """Add a part to the current value, unless it becomes too large."""
        self._n_bytes += len(part)
        if self._n_bytes <= self._max_bytes:
            self._parts.append(part)
        else:
            self._parts = []

    def _line(self, end: int) -> Line:
        self._number += 1
        content = b"".join(self._parts) if self._n_bytes <= self._max_bytes else None
        self._parts, self._n_bytes = [], 0
        return Line(self._number, self._begin, content, end)


# ---- CSV -------------------------------------------------------------------------------------------------------------


class CsvRow(NamedTuple):
    """A row of a CSV file, or what is wrong with it."""

    begin: int
    """Offset of its first byte."""
    values: list[str]
    """The values; empty for a bad row."""
    problem: str = ""
    """What is wrong with the row; empty for a good one."""


def csv_rows(file: IO[bytes], max_bytes: int, delimiter: str) -> Iterator[CsvRow]:
    """The rows of a CSV file that are not blank, the header first.

    Raises ValueError where a row has more than `max_bytes` bytes, mostly because a quote is not closed, and CutOffError
    where the file ends within a quoted value.
    """
    csv.field_size_limit(_ANY_SIZE)  # for the whole process; what bounds a value is the bound on its row
    source = _CsvLines(file, max_bytes, delimiter.encode())
    rows = csv.reader(source, delimiter=delimiter)
    while True:
        begin = source.begin_row()
        try:
            values = next(rows, None)
        except csv.Error as error:
            yield CsvRow(begin, [], f"is no row of CSV: {error}")
            continue
        if values is None:
            return
        if source.ended_within_row:  # csv.reader returns such a row as it is
            raise CutOffError("the file ends within a quoted value")
        if any(map(_HALF.search, values)):
            yield CsvRow(begin, [], "is not UTF-8")
        elif values:
            yield CsvRow(begin, values)


class _CsvLines:
    """The lines of a CSV file as text, which counts the bytes of each row."""

    def __init__(self, file: IO[bytes], max_bytes: int, delimiter: bytes) -> None:
        self._file, self._max_bytes, self._delimiter = file, max_bytes, delimiter
        self._at = self._row_bytes = self._n_values = 0
        self._is_quoted = False
        self.ended_within_row = False

    def begin_row(self) -> int:
        """Begin the next row. Returns its offset."""
        self._row_bytes = self._n_values = 0
        self._is_quoted = False
        return self._at

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        content = self._file.readline(self._max_bytes - self._row_bytes + 1)
        self._at += len(content)
        self._row_bytes += len(content)
        if self._row_bytes > self._max_bytes:
            raise ValueError(f"a row has more than {self._max_bytes} bytes; perhaps a quote is not closed")
        if not content:
            self.ended_within_row = self._row_bytes > 0
            raise StopIteration
        self._count_values(content)
        if self._n_values > _MANY_VALUES:
            raise ValueError(f"a row has more than {_MANY_VALUES:,} values")
        return content.removeprefix(b"" if self._at > len(content) else _MARK).decode(
            "utf-8", "surrogateescape"
        )

    def _count_values(self, content: bytes) -> None:
        """Add the values that begin in a line, as many short ones take far more memory than they have bytes."""
        at = 0
        for quote in _QUOTE.finditer(content):
            if not self._is_quoted:
                self._n_values += content.count(self._delimiter, at, quote.start())
            self._is_quoted, at = not self._is_quoted, quote.end()
        if not self._is_quoted:
            self._n_values += content.count(self._delimiter, at)
