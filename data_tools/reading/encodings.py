"""Decodes text that may not be UTF-8: by its byte-order mark, else as UTF-8, else as the configuration says.

The encoding is never guessed, because a wrong guess would go into the corpus unnoticed. Only an error suggests one.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from typing import IO, Any

from pretrain.errors import ConfigError

UTF_8, GB_18030 = "utf-8", "gb18030"
_KNOWN = {
    "utf-8": UTF_8,
    "utf8": UTF_8,
    "gb18030": GB_18030,
    "gbk": GB_18030,  # GB 18030 contains GBK, which contains GB 2312
    "gb2312": GB_18030,
    "utf-16": "utf-16-le",
    "utf-16-le": "utf-16-le",
    "utf-16-be": "utf-16-be",
}
_MARKS = (
    (codecs.BOM_UTF8, UTF_8),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before the mark of UTF-16, with which it begins
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (b"\x84\x31\x95\x33", GB_18030),
)
HEAD_BYTES = 4096
"""Number of bytes at the beginning of a file that tell its encoding."""
_PIECE_BYTES = 1 << 20
_OTHERS = re.compile(r"[^\x00-\x7f]")
_SURELY_MEANT = 4
_MANY_COMMON = 0.6
# Two bytes of GB 2312: punctuation, full-width letters, and the common characters, which are sorted by their sound.
_COMMON_PAIR = re.compile(rb"[\xa1-\xa3\xb0-\xd7][\xa1-\xfe]")
_PAIR = re.compile(rb"[\x81-\xfe][\x40-\x7e\x80-\xfe]")


def known_encoding(key: str, name: str) -> str:
    """The encoding that an option names, as Python calls it. Raises ConfigError."""
    if name.lower() not in _KNOWN:
        raise ConfigError(f"{key}={name} is unknown; known are {', '.join(_KNOWN)}")
    return _KNOWN[name.lower()]


def encoding_of(head: bytes, given: str) -> str:
    """The encoding of a file: that of its byte-order mark, else UTF-8 or the one that is given.

    The result is UTF-16 or UTF-32 only where the whole file is in it. Any other result is for text that is not UTF-8.
    """
    marked = next((name for mark, name in _MARKS if head.startswith(mark)), None)
    if marked is not None:
        return marked
    return UTF_8 if is_wide(given) and not _has_zeros(head) else given


def is_wide(encoding: str) -> bool:
    """Whether a character of ASCII takes more than a byte, so that lines cannot be found before the text is decoded."""
    return encoding.startswith(("utf-16", "utf-32"))


def _has_zeros(head: bytes) -> bool:
    """Whether text has characters of ASCII in UTF-16. Chinese text without any, not even a line break, is no UTF-8."""
    if 0 in head:
        return True
    try:
        codecs.getincrementaldecoder(UTF_8)().decode(head)
    except UnicodeDecodeError:
        return True
    return False


def decode(content: bytes, encoding: str) -> str:
    """Decode a whole file or line, without a byte-order mark. Raises UnicodeDecodeError."""
    if (
        encoding == UTF_8
    ):  # the codec utf-8-sig does the same in Python, which for a short line takes as long as its JSON
        return (content[3:] if content.startswith(codecs.BOM_UTF8) else content).decode()
    if not is_wide(encoding):
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            pass
        else:
            if _is_meant(text):
                return text
    return content.decode(encoding).removeprefix("\ufeff")


def _is_meant(text: str) -> bool:
    """Whether text that UTF-8 can decode was written in it, although some of the text is in another encoding.

    One character of GB 18030 in seven is also one of UTF-8 of two bytes, such as an accented letter; four in a row are
    not. Chinese takes three bytes in UTF-8.
    """
    others = _OTHERS.findall(text)
    return not others or len(others) >= _SURELY_MEANT or max(others) > "\u07ff"


def advice(content: bytes, key: str) -> str:
    """The end of a sentence on bytes that are not UTF-8: which option would read them, where that can be told."""
    head = content[: 16 * HEAD_BYTES]
    if (found := _suggested(head)) is None:
        return ""
    name, encoding = found
    return f"; it looks like {name}, which {key}={encoding} reads"


def _suggested(head: bytes) -> tuple[str, str] | None:
    """The encoding that bytes seem to be in: its name for people, and its value of the option."""
    half = len(head) // 2
    for first, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        if half > 1 and head[first::2].count(0) > 0.3 * half and head[1 - first :: 2].count(0) == 0:
            return "UTF-16", name
    try:
        codecs.getincrementaldecoder(GB_18030)().decode(head)
    except UnicodeDecodeError:
        return None
    pairs = _PAIR.findall(head)
    common = sum(_COMMON_PAIR.fullmatch(pair) is not None for pair in pairs)
    return ("GB 18030", GB_18030) if pairs and common >= _MANY_COMMON * len(pairs) else None


def recoded(file: Any, encoding: str) -> IO[bytes]:
    """A file as UTF-8, piece by piece. Raises OSError while reading where the text is in neither of both."""
    pieces = _from_wide(file, encoding) if is_wide(encoding) else _from_lines(file, encoding)
    return io.BufferedReader(_Pieces(pieces), _PIECE_BYTES)


def _from_wide(file: Any, encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)()
    while piece := file.read1(_PIECE_BYTES):  # the last piece before damage is not lost
        yield decoder.decode(piece).encode()
    yield decoder.decode(b"", final=True).encode()


def _from_lines(file: IO[bytes], encoding: str) -> Iterator[bytes]:
    """Each line as UTF-8, which it may be already. A line break is never a part of a longer character of `encoding`."""
    rest = b""  # the beginning of a character that goes on in the next piece
    while piece := file.readline(_PIECE_BYTES):
        piece = rest + piece
        decoder = codecs.getincrementaldecoder(UTF_8)()
        try:
            text = decoder.decode(piece)
            is_meant = _is_meant(text)
        except UnicodeDecodeError:
            is_meant = False
        if not is_meant:
            decoder = codecs.getincrementaldecoder(encoding)()
            text = decoder.decode(piece)
        rest = decoder.getstate()[0]
        yield text.encode()
    rest.decode(encoding)


class _Pieces(io.RawIOBase):
    """Pieces of bytes as a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            while not self._left:
                self._left = memoryview(next(self._pieces))
        except StopIteration:
            return 0
        except UnicodeDecodeError as error:
            raise OSError(f"is not {error.encoding} at some place: {error.reason}") from error
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size
