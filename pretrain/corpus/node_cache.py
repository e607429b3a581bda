"""Files kept on the node's disk, shared by all its processes, up to so many bytes.

    <folder>/corpus-<root hash>/000123.chunk     a file that is there as a whole
    <folder>/corpus-<root hash>/000123.chunk.part  one that is being fetched, locked by whoever fetches it
    <folder>/.lock                               8 bytes: an upper bound of the bytes of all files above

A lock is a flock(2), which the kernel takes back whenever its process ends, so that nothing here outlives a crash: a
`.part` that nobody holds is overwritten or swept away. Space is reserved under `.lock` before a byte is written; when
the bound is reached, the files are counted and the least recently used go, down to 90%. Removing a file
does not disturb who has it open, and who misses it fetches it again.
"""

from __future__ import annotations

import logging
import os
import re
import struct
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pretrain.errors import ConfigError
from pretrain.files import try_lock, unlock

Check = Callable[[bytes], str | None]
"""What is wrong with a content, or None."""
MEMORY_BYTES = 256 << 20
"""Kept in memory by a process whose disk takes no more."""
_BLOCK_BYTES = 4096  # space on a disk comes in blocks
_KEEP_FRAC = 0.9  # of the limit after a sweep, so that not every new file needs one
_WAIT_S = 30.0  # for a process that fetches the same file, or sweeps
_POLL_S = 0.02
_OFF_S = 600.0  # after the disk failed, until it is tried again
_TOUCH_S = 10.0  # a file's time of last use is this exact
_BOUND = struct.Struct("<q")
_FOLDER_NAME = re.compile(r"corpus-[0-9a-f]{16,64}")
_log = logging.getLogger(__name__)


class _Entry(NamedTuple):
    used_ns: int
    space: int
    path: str


def default_folder() -> Path:
    """$XDG_CACHE_HOME/pretrain, or else a folder of this user under the system's folder for temporary files."""
    if home := os.environ.get("XDG_CACHE_HOME"):
        return Path(home) / "pretrain"
    return Path(tempfile.gettempdir()) / f"pretrain-cache-{os.getuid()}"


class NodeCache:
    """The files of one corpus in the node's cache. For one process, any of its threads; not for its forked children.

    Raises ConfigError where the folder is another user's, or open to others: hashes are no signatures.
    """

    def __init__(self, folder: Path, root_sha256: str, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._corpus = folder / f"corpus-{root_sha256[:32]}"
        self._verified: dict[str, int] = {}  # name -> inode whose content was checked
        self._memory: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self._swept = False
        self._off_until, self._warned = 0.0, False
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            status, link = folder.stat(), folder.lstat()  # another could make a link to a folder of this user
            if {status.st_uid, link.st_uid} != {os.getuid()} or status.st_mode & 0o022:
                raise ConfigError(
                    f"data.cache_dir={folder} is another user's or can be written by others; give a folder of "
                    "your own"
                )
            self._corpus.mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            self._turn_off(error)

    def has(self, name: str) -> bool:
        """Whether a file is there, unchecked."""
        return name in self._memory or os.path.exists(self._corpus / name)

    def load(self, name: str, check: Check, start: int = 0, stop: int | None = None) -> bytes | None:
        """Bytes [start, stop) of a file, or None where it is not there.

        The whole of it is checked the first time that this process loads it; a damaged one is removed.
        """
        with self._lock:
            if (kept := self._memory.get(name)) is not None:
                self._memory.move_to_end(name)
                return kept[start:stop]
        try:
            descriptor = os.open(self._corpus / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            return self._load(name, descriptor, check, start, stop)
        except OSError as error:
            self._turn_off(error)
            return None
        finally:
            os.close(descriptor)

    def _load(self, name: str, descriptor: int, check: Check, start: int, stop: int | None) -> bytes | None:
        status = os.fstat(descriptor)
        if time.time() - status.st_mtime > _TOUCH_S:
            os.utime(descriptor)
        if self._verified.get(name) == status.st_ino:
            end = status.st_size if stop is None else stop
            content = os.pread(descriptor, end - start, start)
            if len(content) == end - start:
                return content
        content = os.pread(descriptor, status.st_size, 0)
        problem = check(content)
        if problem is None:
            self._verified[name] = status.st_ino
            return content[start:stop]
        _log.warning("%s is damaged and fetched again: %s", self._corpus / name, problem)
        self._verified.pop(name, None)
        with suppress(OSError):
            if os.stat(self._corpus / name).st_ino == status.st_ino:
                os.unlink(self._corpus / name)
        return None

    def get(self, name: str, check: Check, fetch: Callable[[], bytes]) -> bytes:
        """All of a file: as it is here, or else `fetch()`, which is checked already and then kept.

        `fetch` is called by one process of the node at a time, while that takes no longer than half a minute.
        """
        part = self._claim(name)
        try:
            content = self.load(name, check)
            if content is None:
                content = fetch()
                if part is None or not self._publish(part, name, content):
                    self._keep_in_memory(name, content)
            return content
        finally:
            if part is not None:
                self._let_go(part, name)

    def _claim(self, name: str) -> int | None:
        """A descriptor of the locked `.part` of a file; None where the file is there, or the cache is of no use."""
        path, part = self._corpus / name, self._corpus / f"{name}.part"
        deadline = time.monotonic() + _WAIT_S
        while time.monotonic() > self._off_until and not path.exists():
            try:
                descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except OSError as error:
                self._turn_off(error)
                return None
            if try_lock(descriptor):
                if _is_at(descriptor, part):
                    return descriptor
                os.close(descriptor)  # the one who had it has published or removed it
                continue
            os.close(descriptor)
            if time.monotonic() > deadline:
                return None
            time.sleep(_POLL_S)
        return None

    def _publish(self, part: int, name: str, content: bytes) -> bool:
        path = self._corpus / name
        try:
            if not self._reserve(part, len(content)):
                return False
            view = memoryview(content)
            while view:
                view = view[os.write(part, view) :]
            os.rename(f"{path}.part", path)
        except OSError as error:
            self._turn_off(error)
            return False
        self._verified[name] = os.fstat(part).st_ino
        return True

    def _let_go(self, part: int, name: str) -> None:
        path = self._corpus / f"{name}.part"
        if _is_at(part, path):  # not published
            with suppress(OSError):
                os.unlink(path)
        _unlock(part)

    def _reserve(self, part: int, size: int) -> bool:
        """Give a `.part` its final size, under the limit, making room where there is none."""
        space = _space(size)
        if space > self.max_bytes:
            return False
        with self._bound() as bound:
            if bound is None:
                return False
            stored = os.pread(bound, _BOUND.size, 0)
            total = _BOUND.unpack(stored)[0] if len(stored) == _BOUND.size else self.max_bytes
            if not self._swept or total + space > self.max_bytes:
                total = self._sweep(self.max_bytes - space)
                self._swept = True
            if total + space <= self.max_bytes:
                os.ftruncate(part, size)  # a sweep of another process counts it from now on
                total += space
            os.pwrite(bound, _BOUND.pack(total), 0)
            return os.fstat(part).st_size == size

    @contextmanager
    def _bound(self) -> Iterator[int | None]:
        """The locked `.lock`, or None where another process holds it for too long."""
        descriptor = os.open(
            self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        try:
            deadline = time.monotonic() + _WAIT_S
            while not (locked := try_lock(descriptor)) and time.monotonic() < deadline:
                time.sleep(_POLL_S)
            yield descriptor if locked else None
        finally:
            _unlock(descriptor)

    def _sweep(self, max_bytes: int) -> int:
        """Remove what dead processes left and, where that is too much, what was not used for longest. Bytes left."""
        files, total = [], 0
        for entry in self._files():
            if entry.path.endswith(".part"):
                total += 0 if _remove_if_dead(entry.path) else entry.space
            else:
                files.append(entry)
                total += entry.space
        if total <= max_bytes:
            return total
        for entry in sorted(files):
            if total <= max_bytes * _KEEP_FRAC:
                break
            with suppress(FileNotFoundError):
                os.unlink(entry.path)
            total -= entry.space
        return total

    def _files(self) -> Iterator[_Entry]:
        """Every file of every corpus."""
        for corpus in os.scandir(self.folder):
            if _FOLDER_NAME.fullmatch(corpus.name) and corpus.is_dir(follow_symlinks=False):
                for file in os.scandir(corpus.path):
                    with suppress(FileNotFoundError):
                        status = file.stat(follow_symlinks=False)
                        yield _Entry(status.st_mtime_ns, _space(status.st_size), file.path)

    def _keep_in_memory(self, name: str, content: bytes) -> None:
        with self._lock:
            self._memory[name] = content
            while len(self._memory) > 1 and sum(map(len, self._memory.values())) > MEMORY_BYTES:
                self._memory.popitem(last=False)

    def _turn_off(self, error: OSError) -> None:
        self._off_until = time.monotonic() + _OFF_S
        if not self._warned:
            self._warned = True
            _log.warning(
                "the cache in %s cannot be used (%s); chunks are kept in memory, up to %d MiB per process",
                self.folder,
                error.strerror,
                MEMORY_BYTES >> 20,
            )


def _space(size: int) -> int:
    """Bytes of disk that a file of `size` bytes takes."""
    return -(-size // _BLOCK_BYTES) * _BLOCK_BYTES


def _unlock(descriptor: int) -> None:
    """Close a file that may be locked."""
    unlock(descriptor)
    os.close(descriptor)


def _is_at(descriptor: int, path: str | Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        there, here = os.stat(path, follow_symlinks=False), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (there.st_ino, there.st_dev) == (here.st_ino, here.st_dev)


def _remove_if_dead(part: str) -> bool:
    """Remove a `.part` that no process holds."""
    try:
        descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    try:
        if not try_lock(descriptor):
            return False
        if _is_at(descriptor, part):
            os.unlink(part)
        return True
    finally:
        os.close(descriptor)
