"""Extracts the main text of web pages in a separate process, because HTML parsers are C code and pages are untrusted.

The process has limits on its memory and on the processor time of each page. It is started at the first page, and again
after a page that ended it; that page is a bad record.
"""

from __future__ import annotations

import atexit
import codecs
import functools
import io
import os
import re
import resource
import signal
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

HTTP_HEADER_BYTES = 256 << 10
"""Largest size of an HTTP header; a response with a larger one is not read as a page."""

PAGE_CPU_S = 20
"""Limit on the processor time of one page, which depends less on the load of the machine than a clock does."""

_ROOT = Path(__file__).resolve().parents[3]
_DATA_BYTES = 1 << 30
_MANY_TAGS = 250_000
# Parsing a tag takes time quadratic in its number of attributes: 60,000 take 20 s, 2,000 take 20 ms.
_MANY_ATTRIBUTES = 2000
_LONG_TAG_BYTES = 2 * _MANY_ATTRIBUTES
_MANY_PARTS = 20_000  # of a tag, quoted and not: each takes memory
_PART = rb"""(?:[^>"']++|"[^"]*+"|'[^']*+')"""
_NEXT_PART = re.compile(_PART)
# Scripts, styles and comments are matched too, because they contain no tags.
_TAG = re.compile(
    rb"""<(?:(script|style)\b[^>]*+>.*?(?:</\1|\Z)
          |!--.*?(?:-->|\Z)
          |[a-z]%b{0,%d})"""
    % (_PART, _MANY_PARTS),
    re.I | re.S | re.X,
)
_VALUE = re.compile(rb"""=\s*+(?:"[^"]*+"|'[^']*+'|[^\s>"']*+)""")
_META_CHARSET = re.compile(rb"<meta[^>]{1,200}charset\s*=\s*[\"']?\s*([\w-]{3,20})", re.I)
# The encodings of the web (WHATWG), by Python's names. Others, such as punycode, are never used by pages and are slow.
_CHARSETS = frozenset(
    """
    ascii utf-8 utf-8-sig utf-16 utf-16-le utf-16-be utf-32 big5 big5hkscs cp949 cp950 cp932 euc_jp euc_kr gb18030
    gb2312 gbk hz iso2022_jp iso2022_kr johab shift_jis shift_jisx0213 euc_jis_2004 koi8-r koi8-u mac-roman
    mac-cyrillic tis-620 cp437 cp850 cp852 cp855 cp858 cp866 cp874 cp1250 cp1251 cp1252 cp1253 cp1254 cp1255 cp1256
    cp1257 cp1258 iso8859-1 iso8859-2 iso8859-3 iso8859-4 iso8859-5 iso8859-6 iso8859-7 iso8859-8 iso8859-9
    iso8859-10 iso8859-11 iso8859-13 iso8859-14 iso8859-15 iso8859-16
    """.split()
)
_PROBLEM, _TEXT = b"!", b" "


class PageReader:
    """Handle of the process that reads pages."""

    def __init__(self, page_cpu_s: int = PAGE_CPU_S) -> None:
        self._page_cpu_s = page_cpu_s
        self._process: subprocess.Popen[bytes] | None = None

    def read(self, answer: bytes, max_bytes: int) -> tuple[str, str | None]:
        """The main text of an HTTP response, and its problem or None."""
        if self._process is None:
            self._process = self._started()
        try:
            write_frame(self._process.stdin, struct.pack("<Q", max_bytes) + answer)
            reply = read_frame(self._process.stdout)
        except (OSError, EOFError):
            return "", self._ended()
        text = reply[1:].decode("utf-8", "surrogatepass")
        return (text, None) if reply[:1] == _TEXT else ("", text)

    def _started(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        command = [
            sys.executable,
            "-c",
            f"from data_tools.reading.web.pages import main; main({self._page_cpu_s})",
        ]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        return subprocess.Popen(command, **pipes, env={**os.environ, "PYTHONPATH": path})

    def _ended(self) -> str:
        """The reason why a page ended the process."""
        code = self.close()
        if code == -signal.SIGPROF:
            return f"is a page that takes more than {self._page_cpu_s} s to read"
        return f"is a page at which its reader ends (exit code {code})"

    def close(self) -> int:
        """End the process. Returns its exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                pipe.close()
        return process.wait()


@functools.cache
def page_reader() -> PageReader:
    """The page reader of this process."""
    reader = PageReader()
    atexit.register(reader.close)
    return reader


def write_frame(file: IO[bytes] | None, content: bytes) -> None:
    """Write bytes, preceded by their number."""
    assert file is not None
    file.write(struct.pack("<Q", len(content)))
    file.write(content)
    file.flush()


def read_frame(file: IO[bytes] | None) -> bytes:
    """Read what `write_frame` wrote. Raises EOFError at the end of the file."""
    assert file is not None
    head = file.read(8)
    if len(head) < 8:
        raise EOFError
    [length] = struct.unpack("<Q", head)
    content = file.read(length)
    if len(content) < length:
        raise EOFError
    return content


# ---- in the separate process -----------------------------------------------------------------------------------------


def read_answer(answer: bytes, max_bytes: int) -> str:
    """The main text of an HTTP response with a page. Raises ValueError that says what is wrong with the page."""
    stream = io.BytesIO(answer)
    headers = http_headers(stream)
    html = _content(headers, stream).read(max_bytes + 1)
    if len(html) > max_bytes:
        raise ValueError(f"is a page of more than {max_bytes} bytes")
    return main_text(html, headers.get_header("Content-Type"))


def http_headers(stream: IO[bytes]) -> Any:
    """Status and headers of an HTTP response, read up to its content; None if it is not a response."""
    from warcio.statusandheaders import StatusAndHeadersParser

    try:
        return StatusAndHeadersParser([], verify=False).parse(stream)  # archives also have HTTP/2 and 3
    except EOFError:
        return None


def _content(headers: Any, stream: IO[bytes]) -> Any:
    from warcio.bufferedreaders import BufferedReader, ChunkedDataReader

    encoding = (headers.get_header("Content-Encoding") or "").lower()
    known = encoding if encoding in BufferedReader.get_supported_decompressors() else None
    if headers.get_header("Transfer-Encoding") == "chunked":
        return ChunkedDataReader(stream, decomp_type=known)
    return BufferedReader(stream, decomp_type=known) if known else stream


def main_text(html: bytes, content_type: str | None) -> str:
    """The main text of a page; empty where it has none.

    Pages are read independently of each other, so repeated text is not removed. Raises ValueError for a page that is
    made to be slow, and for one at which the extractor fails.
    """
    from trafilatura import extract

    _check_tags(html)
    try:
        text = extract(_decoded(html, content_type), include_comments=False, deduplicate=False)
    except Exception as error:
        # untrusted pages make parsers fail in any way; the page is counted as one that cannot be read
        raise ValueError(f"is a page whose text cannot be extracted ({type(error).__name__})") from error
    return text or ""


def _check_tags(html: bytes) -> None:
    if html.count(b"<") > _MANY_TAGS:
        raise ValueError(f"is a page of more than {_MANY_TAGS:,} tags")
    if len(html) <= _LONG_TAG_BYTES:
        return
    for tag in _TAG.finditer(html):
        is_long = tag.end() - tag.start() > _LONG_TAG_BYTES and not tag[1] and not tag[0].startswith(b"<!")
        if is_long and (
            _NEXT_PART.match(html, tag.end()) or len(_VALUE.sub(b" ", tag[0]).split()) > _MANY_ATTRIBUTES
        ):
            raise ValueError(f"is a page with a tag of more than {_MANY_ATTRIBUTES:,} attributes")


def _decoded(html: bytes, content_type: str | None) -> str:
    """Decode by the charset that the header or the page names, else as UTF-8, GB 18030 or Windows-1252.

    There is no statistical guess, because that would depend on the installed packages.
    """
    header = re.search(r"charset\s*=\s*[\"']?([\w-]+)", content_type or "", re.I)
    meta = _META_CHARSET.search(html[:4096])
    named = [header[1]] if header else []
    named += [meta[1].decode("ascii", "ignore")] if meta else []
    for charset in [*filter(_is_charset, named), "utf-8", "gb18030"]:
        try:
            return html.decode("gb18030" if charset.lower() in ("gb2312", "gbk") else charset)
        except UnicodeDecodeError:
            continue
    return html.decode("cp1252", "replace")


def _is_charset(name: str) -> bool:
    try:
        return codecs.lookup(name).name in _CHARSETS
    except (LookupError, ValueError):
        return False


def serve(requests: IO[bytes], replies: IO[bytes], page_cpu_s: int) -> None:
    """Read pages until there are no more."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C, and closes the pipe
    resource.setrlimit(resource.RLIMIT_DATA, (_DATA_BYTES, _DATA_BYTES))
    while True:
        try:
            request = read_frame(requests)
        except EOFError:
            return
        [max_bytes] = struct.unpack_from("<Q", request)
        # The kernel ends the process at this limit, which C code cannot prevent.
        signal.setitimer(signal.ITIMER_PROF, page_cpu_s)
        try:
            reply = _TEXT + read_answer(request[8:], max_bytes).encode("utf-8", "surrogatepass")
        except ValueError as error:
            reply = _PROBLEM + str(error).encode("utf-8", "replace")
        signal.setitimer(signal.ITIMER_PROF, 0)
        write_frame(replies, reply)


def main(page_cpu_s: int) -> None:
    """Read pages from stdin."""
    with os.fdopen(os.dup(1), "wb") as replies:
        os.dup2(2, 1)  # so that nothing that a library prints is mistaken for a reply
        serve(sys.stdin.buffer, replies, page_cpu_s)
