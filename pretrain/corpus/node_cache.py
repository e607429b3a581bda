"""A size-limited cache of files on the node's disk, shared by all processes of the node.

    <folder>/corpus-<root hash>/000123.chunk       a complete file
    <folder>/corpus-<root hash>/000123.chunk.part  a file that is being fetched, locked by the process that fetches it
    <folder>/.lock                                 8 bytes: an upper bound of the total size of the files above

Locks are flock(2), which the kernel releases when the process ends, so a crash leaves no lock behind; a `.part` that
no process has locked is overwritten or removed. Space is reserved under `.lock` before a byte is written. When the
limit is reached, the files are counted, and the least recently used ones are removed until the total is at most 90% of
the limit. A process that has a removed file open can still read it; one that needs it later fetches it again.
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
"""Returns what is wrong with a file's content, or None."""
MEMORY_BYTES = 256 << 20
"""Size limit in bytes of the cache that a process keeps in memory when the disk cannot be used."""
_BLOCK_BYTES = 4096  # files take disk space in blocks of this size
_KEEP_FRAC = 0.9  # fraction of the limit that a sweep leaves, so that the next files need no sweep
_WAIT_S = 30.0  # time limit for waiting for another process that fetches the same file or sweeps
_POLL_S = 0.02
_OFF_S = 600.0  # seconds after a disk failure until the disk is tried again
_TOUCH_S = 10.0  # a file's time of last use is updated only after this many seconds
_BOUND = struct.Struct("<q")
_FOLDER_NAME = re.compile(r"corpus-[0-9a-f]{16,64}")
_log = logging.getLogger(__name__)


class _Entry(NamedTuple):
    used_ns: int
    space: int
    path: str


def default_folder() -> Path:
    """$XDG_CACHE_HOME/pretrain if that variable is set, otherwise this user's folder in the temporary folder."""
    if home := os.environ.get("XDG_CACHE_HOME"):
        return Path(home) / "pretrain"
    return Path(tempfile.gettempdir()) / f"pretrain-cache-{os.getuid()}"


class NodeCache:
    """The files of one corpus in the node's cache. All threads of one process may share it; forked children may not.

    Raises ConfigError where the folder belongs to another user or others can write to it. The xxh3 hashes of chunks do
    not protect against an attacker who forges files.
    """

    def __init__(self, folder: Path, root_sha256: str, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._corpus = folder / f"corpus-{root_sha256[:32]}"
        self._verified: dict[str, int] = {}  # file name -> inode whose content has been checked
        self._memory: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self._swept = False
        self._off_until, self._warned = 0.0, False
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            status, link = folder.stat(), folder.lstat()  # another user could link to a folder of this user
            if {status.st_uid, link.st_uid} != {os.getuid()} or status.st_mode & 0o022:
                raise ConfigError(
                    f"data.cache_dir={folder} belongs to another user or can be written by others; give a folder of "
                    "your own"
                )
            self._corpus.mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            self._turn_off(error)

    def has(self, name: str) -> bool:
        """Whether the cache has a file. Its content is not checked."""
        return name in self._memory or os.path.exists(self._corpus / name)

    def load(self, name: str, check: Check, start: int = 0, stop: int | None = None) -> bytes | None:
        """Bytes [start, stop) of a file, or None where the cache does not have it.

        The whole file is checked the first time that this process loads it. A damaged file is removed.
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
        """The whole content of a file, from the cache or else from `fetch()`, whose result is then kept.

        `fetch` must return checked content. Only one process of the node fetches a file at a time; the others wait for
        it for up to half a minute, then fetch themselves.
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
        """Lock the `.part` of a file and return its descriptor.

        Returns None where the file is complete by now, or where the cache cannot be used.
        """
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
                os.close(descriptor)  # the previous holder has published or removed this file
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
        if _is_at(part, path):  # the file was not published
            with suppress(OSError):
                os.unlink(path)
        _unlock(part)

    def _reserve(self, part: int, size: int) -> bool:
        """Give a `.part` its final size if that stays within the limit, and remove other files first where necessary.

        Returns whether it fits.
        """
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
                os.ftruncate(part, size)  # from now on the sweeps of other processes count this file
                total += space
            os.pwrite(bound, _BOUND.pack(total), 0)
            return os.fstat(part).st_size == size

    @contextmanager
    def _bound(self) -> Iterator[int | None]:
        """Descriptor of the locked `.lock`; None where another process holds the lock for too long."""
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
        """Remove the files that dead processes left and, above `max_bytes`, the least recently used ones.

        Returns the number of bytes that remain.
        """
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
        """Every file of every corpus in the cache."""
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
    """Disk space in bytes that a file of `size` bytes takes."""
    return -(-size // _BLOCK_BYTES) * _BLOCK_BYTES


def _unlock(descriptor: int) -> None:
    """Unlock and close a file. Closing alone is not enough: a child that was forked meanwhile would keep the lock."""
    unlock(descriptor)
    os.close(descriptor)


def _is_at(descriptor: int, path: str | Path) -> bool:
    """Whether an open file is still the one at this path."""
    try:
        there, here = os.stat(path, follow_symlinks=False), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (there.st_ino, there.st_dev) == (here.st_ino, here.st_dev)


def _remove_if_dead(part: str) -> bool:
    """Remove a `.part` that no process has locked. Returns whether it is gone."""
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
