"""Reads WARC files, the archives of web crawls, record by record; each record is bounded in size.

Raises only OSError and ValueError. `pages.py` extracts the text of a page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

from data_tools.reading.web.pages import HTTP_HEADER_BYTES, http_headers, page_reader
from pretrain.errors import ConfigError

_LINE_BYTES = 64 << 10
_HEADER_BYTES = 1 << 20
_SKIP_BYTES = 1 << 20


class Page(NamedTuple):
    """One page of an archive."""

    number: int
    """Number of its record in the file, from 0."""
    url: str | None
    """Address of the page, where the record states it."""
    text: str
    """Main text; empty where the page has none."""
    problem: str | None
    """What is wrong with the page; None where nothing is."""
    error: Exception | None = None
    """The error for which the file cannot be read any further, from this page on."""


@dataclass(slots=True)
class WarcRecord:
    """The header of a record, whose content follows in the file."""

    fields: dict[str, str]
    """Header fields by their names in lower case; of repeated fields, the first counts."""
    n_bytes: int
    """Size of the content."""

    @property
    def url(self) -> str | None:
        url = self.fields.get("warc-target-uri")
        if (
            url is not None and url.startswith("<") and url.endswith(">")
        ):  # wget 1.19 writes URLs in angle brackets
            url = url[1:-1]
        return None if url is None else url.replace(" ", "%20")


def pages(file: IO[bytes], max_bytes: int) -> Iterator[Page]:
    """The HTML pages of a WARC file: responses with the status 200.

    Where the file cannot be read any further, the last page names the problem.
    """
    try:
        import trafilatura  # noqa: F401 - so that a missing package is reported now, not at the first page
        import warcio  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"reading WARC files needs a package ({error}): pip install 'pretrain[data]'"
        ) from error

    number = 0
    try:
        while (record := read_header(file)) is not None:
            block = _block(file, record, max_bytes)
            if block is not None and record.n_bytes > _most(max_bytes):
                yield Page(number, record.url, "", f"is a page of more than {max_bytes} bytes")
            elif block is not None:
                yield Page(number, record.url, *page_reader().read(block, max_bytes))
            number += 1
    except (OSError, EOFError, ValueError) as error:
        problem = f"cannot be read from here on: {str(error) or type(error).__name__}"
        yield Page(number, None, "", problem, error)


def read_header(file: IO[bytes]) -> WarcRecord | None:
    """The next record's header, or None at the end of the file. Raises OSError, EOFError and ValueError."""
    line = _line(file)
    while line.isspace():  # two blank lines stand between records
        line = _line(file)
    if not line:
        return None
    if not line.upper().startswith(b"WARC/"):
        raise ValueError("it is no WARC file, or a record is longer than it says")
    fields: dict[str, str] = {}
    name, left = "", _HEADER_BYTES
    while not (line := _line(file)).isspace():
        if not line:
            raise EOFError("the file ends within the header of a record")
        left -= len(line)
        if left < 0:
            raise ValueError(f"the header of a record has more than {_HEADER_BYTES} bytes")
        text = _decoded(line).rstrip()
        if text[:1] in (" ", "\t"):
            if name:
                fields[name] += text
            continue
        name, colon, value = text.partition(":")
        name = name.rstrip(" \t").lower() if colon else ""
        if name in fields:
            name = ""
        elif name:
            fields[name] = value.lstrip()
    length = fields.get("content-length", "")
    if not re.fullmatch(r"\d{1,18}", length, re.A):
        raise ValueError(
            f"a record has the Content-Length {length!r}" if length else "a record has no Content-Length"
        )
    return WarcRecord(fields, int(length))


def _line(file: IO[bytes]) -> bytes:
    line = file.readline(_LINE_BYTES)
    if len(line) == _LINE_BYTES and not line.endswith(b"\n"):
        raise ValueError(f"a line of the header of a record has more than {_LINE_BYTES} bytes")
    return line


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return line.decode("latin-1")


def _most(max_bytes: int) -> int:
    return max_bytes + HTTP_HEADER_BYTES


def _block(file: IO[bytes], record: WarcRecord, max_bytes: int) -> bytes | None:
    """The content of a record that is a page, cut off where it is too long; None for others, which are skipped."""
    left, block = record.n_bytes, b""
    if record.fields.get("warc-type") == "response" and (record.url or "").startswith(("http:", "https:")):
        block = file.read(min(left, HTTP_HEADER_BYTES))
        left -= len(block)
        is_page = bool(block) and _is_page(http_headers(io.BytesIO(block)))
        if is_page and record.n_bytes <= _most(max_bytes):
            rest = file.read(left)
            left -= len(rest)
            block += rest
    else:
        is_page = False
    while left and (skipped := len(file.read(min(left, _SKIP_BYTES)))):
        left -= skipped
    if left:
        raise EOFError("the file ends within the record")
    return block if is_page else None


def _is_page(headers: Any) -> bool:
    kind = (headers.get_header("Content-Type", "") if headers else "").split(";")[0].strip().lower()
    return kind in ("text/html", "application/xhtml+xml") and headers.get_statuscode() == "200"
