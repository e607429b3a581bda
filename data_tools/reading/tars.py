"""Tars of text in webdataset's conventions, read sample by sample.

The members of a sample are consecutive and share their names up to the first dot: `000001.txt` is its text, and
`000001.json` or `000001.json.gz` has its fields. Other members are skipped. This module reads the headers itself,
because tarfile allocates as much memory as a header asks for. Neither tarfile nor webdataset's reader, which uses it,
reports a tar that was truncated between two members.

Raises only OSError, EOFError, zlib.error and ValueError.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from data_tools.reading.bounded import BOMB_FREE_BYTES, BROKEN, Bounds, parse_json, unpacked
from data_tools.reading.encodings import HEAD_BYTES, UTF_8, decode, encoding_of
from data_tools.reading.listing import is_companion

BLOCK_BYTES = 512
_ZEROS = bytes(BLOCK_BYTES)
_EXTENSION_BYTES = 64 << 10  # largest size of an extended header, which only describes the next member
_READ_BYTES = 1 << 20
_TEXT, _JSON, _JSON_GZ = "txt", "json", "json.gz"
_READ = (_TEXT, _JSON, _JSON_GZ)

_REGULAR = {b"0", b"\0", b"7"}
_FOLDER = b"5"
_OTHERS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}
_SPARSE = b"S"
_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK = b"x", b"g", b"L", b"K"

_META = re.compile(r"__[^/]*__(/|$)")  # members that webdataset skips
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


class Sample(NamedTuple):
    """One sample, or what is wrong with it."""

    fields: dict[str, Any]
    """The object in its JSON member; empty if it has none."""
    text: str | None
    """The content of its text member; None if it has none."""
    problem: str = ""
    """What is wrong with the sample; empty for a good one."""
    is_too_large: bool = False
    """Whether the problem is the sample's size."""


class Member(NamedTuple):
    """The header of one file in a tar."""

    name: str
    """The name as the tar has it; bytes that are not UTF-8 are surrogates."""
    kind: bytes
    """The type flag of the header."""
    n_bytes: int
    """Size of the content in bytes."""


class _Tar:
    """A tar that is read from its beginning to its end."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._size_bytes = file.seek(0, os.SEEK_END)
        file.seek(0)
        self.at = 0

    def members(self) -> Iterator[Member]:
        """Yield each member, whose content can be read until the next one is requested."""
        long_name: str | None = None
        pax: dict[str, str] = {}
        while (header := self._header()) is not None:
            if header.kind in (_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK):
                content = self._extension(header)
                if header.kind == _PAX:
                    pax = _pax_records(content)
                elif header.kind == _LONG_NAME:
                    long_name = _decoded(content)
                elif header.kind == _PAX_GLOBAL and {"path", "size"} & _pax_records(content).keys():
                    raise ValueError(
                        "a global pax header sets the name or the size of all members that follow"
                    )
                continue
            name = pax.get("path", long_name or header.name)
            member = Member(name, header.kind, _pax_size(pax, header.n_bytes))
            if header.kind == _SPARSE or any(key.startswith("GNU.sparse.") for key in pax):
                raise ValueError(f"the member {_shown(name)} is a sparse file; pack it without --sparse")
            if header.kind not in {*_REGULAR, _FOLDER, *_OTHERS}:
                raise ValueError(f"the member {_shown(name)} is of the unknown kind {header.kind!r}")
            if header.kind not in _REGULAR:
                member = member._replace(n_bytes=0)  # whatever the header says, nothing follows it
            end = self.at + _padded(member.n_bytes)
            if end > self._size_bytes:
                raise EOFError(f"the tar was cut off within the member {_shown(name)}")
            yield member
            self._file.seek(end)
            self.at, long_name, pax = end, None, {}

    def content(self, member: Member) -> bytes:
        """The content of the member that was yielded last."""
        return self._exactly(member.n_bytes)

    def _header(self) -> Member | None:
        """The next header, or None after the last member."""
        block = self._exactly(BLOCK_BYTES)
        if block == _ZEROS:
            self._check_end()
            return None
        try:
            expected = _number(block[148:156])
        except ValueError:
            expected = -1
        if sum(block) - sum(block[148:156]) + 8 * ord(" ") != expected:
            raise ValueError(f"there is no header of a tar at byte {self.at - BLOCK_BYTES}")
        name = _decoded(block[:100])
        if block[257:263] == b"ustar\0" and block[345]:  # GNU's own format uses this field differently
            name = f"{_decoded(block[345:500])}/{name}"
        return Member(name, block[156:157], _number(block[124:136]))

    def _check_end(self) -> None:
        """Check the end of the tar: two blocks of zeros, after which only more zeros may follow."""
        if self._exactly(BLOCK_BYTES) != _ZEROS:
            raise ValueError(f"something follows the end of the tar, which is at byte {self.at}")
        while rest := self._file.read(_READ_BYTES):
            if rest.count(0) != len(rest):
                raise ValueError("something follows the end of the tar; is it several tars in one file?")

    def _extension(self, header: Member) -> bytes:
        if header.n_bytes > _EXTENSION_BYTES:
            raise ValueError(
                f"the extended header of a member has {header.n_bytes:,} bytes, more than {_EXTENSION_BYTES:,}"
            )
        return self._exactly(_padded(header.n_bytes))[: header.n_bytes]

    def _exactly(self, n_bytes: int) -> bytes:
        content = self._file.read(n_bytes) if n_bytes <= self._size_bytes - self.at else b""
        if len(content) < n_bytes:
            raise EOFError(
                f"the tar was cut off: it ends at byte {self._size_bytes} without two blocks of zeros"
            )
        self.at += n_bytes
        return content


def _padded(n_bytes: int) -> int:
    return n_bytes + -n_bytes % BLOCK_BYTES


def _decoded(name: bytes) -> str:
    return name.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int:
    """A number in a header, written as octal digits or in binary. Raises ValueError."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip(b" ")
    if not re.fullmatch(rb"[0-7]*", digits):
        raise ValueError(f"a header of the tar has {field!r} where a number should be")
    return int(digits or b"0", 8)


def _pax_records(content: bytes) -> dict[str, str]:
    """The records of a pax header, `LENGTH KEY=VALUE` and a newline each. Raises ValueError."""
    records: dict[str, str] = {}
    at = 0
    while at < len(content):
        found = re.compile(rb"(\d{1,9}) ([^=\n]{1,256})=").match(content, at)
        end = at + int(found[1]) if found else 0
        if found is None or end > len(content) or end <= found.end() or content[end - 1 : end] != b"\n":
            raise ValueError("a pax header is broken")
        records[found[2].decode("utf-8", "replace")] = content[found.end() : end - 1].decode(
            "utf-8", "surrogateescape"
        )
        at = end
    return records


def _pax_size(pax: dict[str, str], n_bytes: int) -> int:
    size = pax.get("size")
    if size is None:
        return n_bytes
    if not re.fullmatch(r"\d{1,18}", size, re.ASCII):
        raise ValueError("a pax header has a size that is no number")
    return int(size)


def _shown(name: str) -> str:
    return ascii(name[:200]) if _UNPRINTABLE.search(name) else repr(name[:200])


# ---- samples ---------------------------------------------------------------------------------------------------------


class _Draft:
    """A sample whose members are being read."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.parts: dict[str, bytes] = {}
        self.others: list[str] = []
        self.problem = ""
        self.is_too_large = False

    def refuse(self, problem: str) -> None:
        """Record a problem, unless the sample already has one."""
        self.problem = self.problem or problem

    def finished(self, encoding: str) -> Sample:
        """The sample that its members describe. Text without a byte-order mark that is not UTF-8 is in `encoding`."""
        if not self.problem and not self.parts:
            others = ", ".join(f".{suffix[:20]}" for suffix in self.others[:8])
            self.refuse(f"has no member .txt, .json or .json.gz (it has {others})")
        if not self.problem and _JSON in self.parts and _JSON_GZ in self.parts:
            self.refuse("has both a member .json and a member .json.gz")
        if self.problem:
            return self._refused()
        fields: Any = {}
        text: str | None = None
        suffix = ""
        try:
            for suffix in list(self.parts):
                own = encoding_of(self.parts[suffix][:HEAD_BYTES], encoding)
                if suffix == _TEXT:
                    text = decode(self.parts.pop(suffix), own)
                else:
                    fields = parse_json(self.parts.pop(suffix), own)
        except ValueError as error:
            what = "UTF-8" if suffix == _TEXT else "JSON"
            self.refuse(f"has a member .{suffix} that is no {what}: {str(error).splitlines()[0]}")
        if not isinstance(fields, dict):
            self.refuse(f"has in its JSON a {type(fields).__name__}, no object")
        return self._refused() if self.problem else Sample(fields, text)

    def _refused(self) -> Sample:
        return Sample({}, None, f"(sample {_shown(self.key)}) {self.problem}", self.is_too_large)


def samples(file: IO[bytes], bounds: Bounds, encoding: str = UTF_8) -> Iterator[Sample]:
    """The samples of a tar. If it is truncated, the sample that was being read is left out, and an error is raised."""
    tar = _Tar(file)
    unpacked_bytes = 0
    draft: _Draft | None = None
    for member in tar.members():
        folder, slash, file_name = member.name.rpartition("/")
        stem, dot, suffix = file_name.partition(".")
        if member.kind == _FOLDER or not stem or _META.match(member.name):
            continue
        if not dot:
            if is_companion(file_name):
                continue
            yield Sample(
                {}, None, f"(member {_shown(member.name)}) has no suffix, so it belongs to no sample"
            )
            continue
        key, suffix = f"{folder}{slash}{stem}", suffix.lower()
        if draft is None or draft.key != key:
            if draft is not None:
                yield draft.finished(encoding)
            draft = _Draft(key)
        if (problem := _member_problem(member)) is not None:
            draft.refuse(problem)
        elif suffix in draft.parts:
            draft.refuse(f"has two members .{suffix}")
        elif suffix not in _READ:
            draft.others += [suffix] if len(draft.others) < 8 else []
        else:
            unpacked_bytes += _take(draft, suffix, member, tar, bounds)
            if unpacked_bytes > bounds.unpacked_bytes:
                raise ValueError(f"its members unpack to more than {bounds.unpacked_bytes} bytes")
            if unpacked_bytes > max(BOMB_FREE_BYTES, bounds.ratio * tar.at):
                raise ValueError(f"its members unpack to more than {bounds.ratio} times their size")
    if draft is not None:
        yield draft.finished(encoding)


def _member_problem(member: Member) -> str | None:
    """The reason for refusing a member, or None. No file gets its name, but a valid tar has no such names."""
    name = member.name
    if member.kind in _OTHERS:
        return f"has the member {_shown(name)}, which is {_OTHERS[member.kind]}"
    if name.startswith("/") or ".." in name.split("/"):
        return f"has a member whose name leads out of the tar: {_shown(name)}"
    if _UNPRINTABLE.search(name):
        return f"has a member whose name is no UTF-8, or holds control characters: {_shown(name)}"
    return None


def _take(draft: _Draft, suffix: str, member: Member, tar: _Tar, bounds: Bounds) -> int:
    """Read a member into the draft, unless it makes the sample too large. Returns the number of unpacked bytes."""
    room = bounds.record_bytes - sum(map(len, draft.parts.values()))
    content, n_unpacked = b"", 0
    if member.n_bytes <= room:
        content = tar.content(member)
        if suffix == _JSON_GZ:
            content, problem = _unzipped(content, room + 1, bounds)
            n_unpacked = len(content)
            if problem:
                draft.refuse(f"has a member .{suffix} that cannot be unpacked: {problem}")
    if max(member.n_bytes, len(content)) > room:
        draft.refuse(f"is a sample of more than {bounds.record_bytes} bytes")
        draft.is_too_large = True
        content = b""
    draft.parts[suffix] = content
    return n_unpacked


def _unzipped(packed: bytes, max_bytes: int, bounds: Bounds) -> tuple[bytes, str]:
    """The first bytes of a gzip file, and its problem; empty if it has none."""
    file = unpacked(io.BytesIO(packed), ".gz", bounds)
    blocks: list[bytes] = []
    left = max_bytes
    problem = ""
    try:
        while left and (block := file.read(min(left, _READ_BYTES))):
            blocks.append(block)
            left -= len(block)
    except BROKEN as error:
        problem = str(error) or type(error).__name__
    return b"".join(blocks), problem
