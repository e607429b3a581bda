"""Lists the files of an input: those to read, each with its format, and those that are left out, each with its reason.

No file is passed over in silence: what is not read is returned too, and says whether documents are lost with it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatch
from typing import Any, NamedTuple

from pretrain.errors import ConfigError
from pretrain.printing import print_error
from pretrain.remote import check_url, file_system

_PACKED = (".gz", ".zst", ".xz", ".bz2")
_PLAIN = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".warc": "warc",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
_CONTAINERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "tar"}
FORMATS = (
    _PLAIN | {plain + packed: kind for plain, kind in _PLAIN.items() for packed in _PACKED} | _CONTAINERS
)
"""The format of a file, by its suffix."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
_SHARD_NUMBER = re.compile(r"[-_.]?\d+(-of-\d+)?$")
_MAX_SHARDS = 100_000
_DATASET_NAME = "dataset_info.json"  # is in the same folder as the Arrow files of a Hugging Face dataset
_DATASET_NAMES = (_DATASET_NAME, "dataset_infos.json", "dataset_dict.json")
# Files that stand beside data and hold no documents: marks, checksums, licenses, settings, pictures and sounds.
_COMPANION = re.compile(
    r"""_(success|metadata|common_metadata|committed_\w+|started_\w+)
        |(licen[cs]e|copying|notice|authors|readme|citation|changelog|makefile)([-._].*)?
        |(checksums?|(md5|sha\d+|b2)sums?)([-._].*)?
        |.*\.(md5|sha1|sha256|sha512|crc|crc32|sig|asc|idx|lock|ya?ml|toml|ini|cfg|cff
             |png|jpe?g|gif|webp|svg|bmp|ico|tiff?|mp3|wav|flac|ogg|mp4|mkv|avi|mov|webm)""",
    re.I | re.X,
)
_PART = re.compile(
    r"part-\d+.*"
)  # of a result that several tasks wrote, some of which may have had nothing to write
_SHOWN = 10


class FoundFile(NamedTuple):
    """A file that an input names."""

    path: str
    """A path on this machine, or a URL."""
    relative: str
    """The path below the input; empty where the file is the input itself."""
    suffix: str
    """The key in FORMATS."""
    size_bytes: int | None
    """Size in bytes; None if the store of a URL does not report it."""
    changed: Any
    """Time of the last change in nanoseconds; for a URL, the version that its store reports."""


class LeftOut(NamedTuple):
    """A file of an input that is not read."""

    name: str
    """The path below the input; the callers of `files_in` put the input's own name before it."""
    reason: str
    """The reason why it is not read. It continues a sentence that begins with the name."""
    size_bytes: int
    """Size in bytes; 0 where it is not known."""
    holds_documents: bool
    """Whether documents may be lost with it, so that it counts as bad."""


OnLeftOut = Callable[[Sequence[LeftOut]], None]
"""Is called once with all files of all inputs that are not read."""


def print_left_out(left_out: Sequence[LeftOut]) -> None:
    """Name files that are not read on stderr, those with documents first."""
    lost = [file for file in left_out if file.holds_documents]
    for file in lost[:_SHOWN]:
        print_error("not read", f"{file.name} {file.reason}")
    if len(lost) > _SHOWN:
        print_error("not read", f"{len(lost) - _SHOWN:,} more files")
    others = [f"{file.name} ({file.reason})" for file in left_out if not file.holds_documents]
    if others:
        more = f" and {len(others) - _SHOWN:,} more" if len(others) > _SHOWN else ""
        print_error("not read, and not counted as bad", ", ".join(others[:_SHOWN]) + more)


def is_url(entry: str) -> bool:
    """Whether an input is a URL."""
    return _URL.match(entry) is not None


def is_companion(name: str) -> bool:
    """Whether a file of this name stands beside data and holds no documents, such as a license or a checksum."""
    return _COMPANION.fullmatch(name) is not None


def suffix_of(name: str) -> str:
    """The key in FORMATS for a file's name; empty where the format is not known."""
    return next((suffix for suffix in FORMATS if name.lower().endswith(suffix)), "")


def known_suffixes(formats: Collection[str]) -> str:
    """The suffixes of files of these formats, for an error."""
    plain = [suffix for suffix, kind in _PLAIN.items() if kind in formats]
    containers = [suffix for suffix, kind in _CONTAINERS.items() if kind in formats]
    return f"{', '.join(plain)} (also with {', '.join(_PACKED)} after it), {', '.join(containers)}"


def expand_ranges(inputs: list[str]) -> list[str]:
    """The inputs, with `a-{000..099}.tar` expanded to 100 names, whose numbers are padded like the first one.

    A name with braces that exists as it is stays as it is. Raises ConfigError for a range that is empty or too long.
    """
    expanded: list[str] = []
    for entry in inputs:
        found = _RANGE.search(entry)
        if found is None or os.path.exists(os.path.expanduser(entry)):
            expanded.append(entry)
            continue
        first, last = int(found[1]), int(found[2])
        if not 0 <= last - first < _MAX_SHARDS:
            raise ConfigError(
                f"input={entry}: the range {found[0]} must ascend and hold {_MAX_SHARDS:,} numbers at most"
            )
        width = len(found[1]) if found[1].startswith("0") else 0
        head, tail = entry[: found.start()], entry[found.end() :]
        expanded += expand_ranges([f"{head}{number:0{width}}{tail}" for number in range(first, last + 1)])
        if len(expanded) > _MAX_SHARDS:
            raise ConfigError(f"input={entry} stands for more than {_MAX_SHARDS:,} files")
    return expanded


def files_in(
    entry: str, formats: Collection[str], ignore: Collection[str] = ()
) -> tuple[list[FoundFile], list[LeftOut]]:
    """The files of an input to read, ordered by path, and those that are left out.

    The files of a folder are all below it. Folders behind links count, and each real folder is entered once. `ignore`
    holds patterns of paths or names. Raises ConfigError where the input does not exist, or has no file to read.
    """
    listing = _Listing(formats, ignore)
    if is_url(entry):
        listing.add_url(entry)
    else:
        listing.add_local(entry)
    listing.sort_out()
    if not listing.files:
        first = next((f" ({file.name} {file.reason})" for file in listing.left_out), "")
        raise ConfigError(
            f"input={readable(entry)} has no file that can be read{first}; known are {known_suffixes(formats)}"
        )
    listing.files.sort(key=lambda file: os.fsencode(file.path))
    listing.left_out.sort()
    return listing.files, listing.left_out


class _Listing:
    """The files of one input while they are listed."""

    def __init__(self, formats: Collection[str], ignore: Collection[str]) -> None:
        self._formats, self._ignore = formats, ignore
        self.files: list[FoundFile] = []
        self.left_out: list[LeftOut] = []

    def _leave_out(self, relative: str, reason: str, size_bytes: int, holds_documents: bool) -> None:
        self.left_out.append(LeftOut(readable(relative), reason, size_bytes, holds_documents))

    def _add(self, path: str, relative: str, size_bytes: int | None, changed: Any) -> None:
        self.files.append(FoundFile(path, relative, suffix_of(path), size_bytes, changed))

    def add_url(self, entry: str) -> None:
        """Add the files behind a URL."""
        check_url("input", entry)
        fs, root = file_system(entry)
        try:
            listed = {root: fs.info(root)} if fs.isfile(root) else fs.find(root, detail=True)
        except OSError as error:
            raise ConfigError(f"input={entry} cannot be listed: {reason_of(error)}") from error
        for path, info in listed.items():
            relative = "" if path == root else path.removeprefix(root.rstrip("/") + "/")
            if relative == path or "?" in relative:
                continue  # outside of the input, or a link of an index page that only sorts it
            if any(part.startswith(".") for part in relative.split("/")):
                self._leave_out(relative, "is hidden", info.get("size") or 0, False)
                continue
            changed = info.get("ETag") or info.get("mtime") or info.get("created")
            self._add(fs.unstrip_protocol(path), relative, info.get("size"), changed)

    def add_local(self, root: str) -> None:
        """Add a file of this machine, or the files below a folder."""
        if not os.path.exists(root):
            raise ConfigError(f"input={readable(root)} does not exist")
        if os.path.isdir(root):
            try:
                self._walk(root)
            except OSError as error:
                place = error.filename or root
                raise ConfigError(f"input={readable(place)} cannot be listed: {reason_of(error)}") from error
            return
        if FORMATS.get(suffix_of(root)) not in self._formats:
            known = known_suffixes(self._formats)
            raise ConfigError(f"input={readable(root)} is of an unknown kind; known are {known}")
        if not os.path.isfile(root):
            raise ConfigError(f"input={readable(root)} cannot be read: it is not a regular file")
        self._add_file(root, "")

    def _walk(self, root: str) -> None:
        """Add what is below a folder. Links to folders are followed last, after all real folders."""
        seen = set[str]()
        folders, links = [root], list[str]()
        while folders or links:
            is_link = not folders
            folder = folders.pop() if folders else links.pop(0)
            if (real := os.path.realpath(folder)) in seen:
                if is_link:
                    reason = "is a link to a folder that is read already"
                    self._leave_out(os.path.relpath(folder, root), reason, 0, False)
                continue
            seen.add(real)
            for name in sorted(os.listdir(folder), key=os.fsencode):
                path = os.path.join(folder, name)
                relative = os.path.relpath(path, root)
                if name.startswith("."):
                    self._leave_out(relative, "is hidden", 0, False)
                elif not os.path.isdir(path):
                    self._add_file(path, relative)
                elif os.path.islink(path):
                    links.append(path)
                else:
                    folders.append(path)

    def _add_file(self, path: str, relative: str) -> None:
        holds_documents = not is_companion(os.path.basename(path))
        if os.path.isfile(path):
            stat = os.stat(path)
            self._add(path, relative, stat.st_size, stat.st_mtime_ns)
        elif os.path.lexists(path) and not os.path.exists(path):
            self._leave_out(relative, "is a link that leads nowhere", 0, holds_documents)
        else:
            self._leave_out(relative, "is not a regular file", 0, holds_documents)

    def sort_out(self) -> None:
        """Leave out the files that are not to be read."""
        described = {os.path.dirname(file.path) for file in self.files if _name(file) == _DATASET_NAME}
        kept = []
        for file in self.files:
            if (
                file.size_bytes == 0
                and file.suffix in _PLAIN
                and file.relative
                and _PART.fullmatch(_name(file))
            ):
                continue
            is_described = os.path.dirname(file.path) in described
            reason, holds_documents = self._reason_against(file, is_described)
            if reason:
                self._leave_out(file.relative or _name(file), reason, file.size_bytes or 0, holds_documents)
            else:
                kept.append(file)
        self.files = kept

    def _reason_against(self, file: FoundFile, is_described: bool) -> tuple[str, bool]:
        """Why a file is not read, and whether documents are lost with it; "" for a file to read.

        `is_described` tells whether the file is in a folder of a Hugging Face dataset.
        """
        name, kind = _name(file), FORMATS.get(file.suffix)
        if any(fnmatch(file.relative, pattern) or fnmatch(name, pattern) for pattern in self._ignore):
            return "is ignored as the configuration says", False
        if name in _DATASET_NAMES or (is_described and name == "state.json"):
            return "describes a dataset", False
        if kind is None:
            if is_companion(name):
                return "is no text", False
            return ("is empty", False) if file.size_bytes == 0 else ("is of an unknown kind", True)
        if kind not in self._formats:
            return f"is of the kind {file.suffix}, which holds no dialogues", False
        if kind == "arrow" and is_described and name.startswith("cache-"):
            return "is a cache", False
        if kind == "arrow" and not is_described:
            return f"is not a dataset of Hugging Face: {_DATASET_NAME} is not beside it", True
        if file.size_bytes == 0 and file.relative:
            is_broken = kind in _CONTAINERS.values() or file.suffix not in _PLAIN
            return "is empty", is_broken
        return "", False


def _name(file: FoundFile) -> str:
    return os.path.basename(file.path)


def readable(name: str) -> str:
    """A file name as text. Invalid UTF-8 and control characters become \\x.., so that names stay different."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def shard_source(path: str) -> str:
    """The source of a tar: its name without the shard number (`web` for `web-000.tar`), or else its folder."""
    name = os.path.basename(path)
    folder = os.path.basename(os.path.dirname(path if is_url(path) else os.path.abspath(path)))
    return _SHARD_NUMBER.sub("", name[: -len(".tar")]) or folder or name


def reason_of(error: BaseException) -> str:
    """The message of an error, in one line."""
    return getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__
