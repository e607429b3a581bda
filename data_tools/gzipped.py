"""A gzip writer whose files may be abandoned halfway."""

from __future__ import annotations

import struct
import zlib
from typing import BinaryIO


class Gzipped:
    """Compresses into an open file, and gives the same bytes as gzip.GzipFile without a name and a time.

    GzipFile itself writes once more when it is garbage-collected, and Python 3.13 prints an error that occurs then. So
    a full disk would be reported twice, the second time as a traceback.
    """

    def __init__(self, raw: BinaryIO, level: int = 9) -> None:
        self._raw = raw
        self._deflate = zlib.compressobj(level, wbits=-zlib.MAX_WBITS)
        self._crc, self._size = zlib.crc32(b""), 0
        raw.write(b"\x1f\x8b\x08" + bytes(5) + (b"\x02" if level == 9 else b"\x00") + b"\xff")  # RFC 1952

    def write(self, content: bytes | memoryview) -> None:
        self._crc, self._size = zlib.crc32(content, self._crc), self._size + len(content)
        self._raw.write(self._deflate.compress(content))

    def finish(self) -> None:
        """Write the rest of the stream and its checksum; the file stays open."""
        self._raw.write(self._deflate.flush() + struct.pack("<II", self._crc, self._size & 0xFFFFFFFF))
