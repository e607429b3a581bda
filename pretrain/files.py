"""Files are read and written as if someone had put links, pipes and huge files in their place.

Reading: a regular file, at most as large as expected, opened once and never waited for. Writing: a link is never
followed, a temporary file is always new, and a file is there as a whole or not at all.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TextIO

from pretrain.errors import ConfigError

_READ_BYTES = 1 << 20
_HOLDER_CHARS = 200
"""Read of what a lock file says of its holder."""

# ---- reading ---------------------------------------------------------------------------------------------------------


def open_regular(path: str | Path, inside: Path | None = None) -> BinaryIO:
    """A regular file, opened for reading, which may lie behind a link; with `inside`, within that folder only.

    Raises ConfigError for a pipe, a device or a folder, and for a link out of `inside`, and OSError.
    """
    # Without O_NONBLOCK, opening a named pipe would wait for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    opened, problem = Path(f"/proc/self/fd/{descriptor}"), None  # what a name leads to may change meanwhile
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        problem = "cannot be read: it is not a regular file"
    elif inside is not None and not is_inside(opened, inside):
        problem = f"is a link to a file outside of {inside}; put the file itself there"
    if problem is not None:
        os.close(descriptor)
        raise ConfigError(f"{path} {problem}")
    return open(descriptor, "rb")


def read_capped(path: str | Path, max_bytes: int, inside: Path | None = None) -> bytes:
    """All of a regular file, refused before any memory is taken where it has more than `max_bytes`.

    Raises ConfigError for a larger file, and as `open_regular` does, and OSError.
    """
    with open_regular(path, inside) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        content = read_at_most(file, max_bytes + 1) if size_bytes <= max_bytes else b""
    if max(size_bytes, len(content)) > max_bytes:  # files of /proc say that they have none
        raise ConfigError(
            f"{path} has {max(size_bytes, len(content)):,} bytes, where at most {max_bytes:,} are expected; it is not "
            "what it should be"
        )
    return content


def read_at_most(file: BinaryIO, n_bytes: int) -> bytes:
    """The next bytes of a file. Memory is taken for what is there, where `read` takes it for what it is asked for."""
    blocks: list[bytes] = []
    left = n_bytes
    while left and (block := file.read(min(left, _READ_BYTES))):
        blocks.append(block)
        left -= len(block)
    return b"".join(blocks)


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path, with all its links followed, lies within a folder."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def refuse_links(folder: Path, inside: Path, advice: str, leave_out: str = "") -> None:
    """Raise ConfigError where `folder`, or anything in it, is a link that leads out of the folder `inside`.

    For folders that are written into and may have been made by others. `advice`: what to do instead of the link.
    `leave_out`: a pattern of folders below `folder` that nothing is written into any more, and that are not searched.
    """
    closed = set(folder.glob(leave_out)) if leave_out else set()
    places = [folder]
    while places:
        place = places.pop()
        if place.is_symlink() and not is_inside(place, inside):
            raise ConfigError(f"{place} is a link out of its folder, to {os.readlink(place)}; {advice}")
        if place not in closed and (place is folder or not place.is_symlink()):
            with (
                suppress(FileNotFoundError),
                os.scandir(place) as entries,
            ):  # what another process removes meanwhile
                places += [Path(e.path) for e in entries if e.is_symlink() or e.is_dir(follow_symlinks=False)]


# ---- writing ---------------------------------------------------------------------------------------------------------


def create_file(path: str | Path, mode: int = 0o666) -> BinaryIO:
    """A new file, opened for writing; what stood at its name is removed, and what a link there led to is untouched.

    `mode` is what the umask is applied to; 0o600 for what may hold a secret. Raises OSError.
    """
    Path(path).unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return open(os.open(path, flags, mode), "wb")


def open_for_append(path: str | Path, mode: int = 0o666) -> int:
    """A descriptor that appends to a regular file, made where it is missing, and that can read what is there.

    Raises OSError, also where the name is a link or not a regular file.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, mode)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a regular file")
    return descriptor


def touch(path: str | Path) -> None:
    """Have a file there, with what it holds. Raises OSError."""
    os.close(open_for_append(path))


def let_umask_decide(path: str | Path) -> None:
    """Give a file the mode that it would have if a program had made it without asking for another one.

    safetensors makes its files 0600, which keeps them from those who may read all that lies beside them.
    """
    status = Path("/proc/self/status").read_text()  # the only way to know the umask without changing it
    umask = int(status.partition("Umask:")[2].split()[0], 8)
    os.chmod(path, 0o666 & ~umask)


@contextmanager
def written_atomically(path: Path, *, durable: bool, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A new file to write to; it takes the name `path` when the block ends well, and what stood there stays till then.

    `durable`: the content is on the disk before it has its name, and the name before this returns, so that a power
    cut leaves the old file or the new one. Otherwise this holds for a killed process only, and costs no sync.
    `mode` as for `create_file`. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with create_file(temporary, mode) as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def write_atomically(path: Path, content: bytes, *, durable: bool = True, mode: int = 0o666) -> None:
    """Write a file that is there as a whole or not at all; `durable` and `mode` as for `written_atomically`."""
    with written_atomically(path, durable=durable, mode=mode) as file:
        file.write(content)


def sync_folder(folder: Path) -> None:
    """Make renames within a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- locks -----------------------------------------------------------------------------------------------------------


def open_lock(path: str | Path) -> TextIO:
    """A file to be locked, made where it is missing, whose words can be read and replaced. Raises OSError."""
    return open(open_for_append(path), "a+", encoding="utf-8")


def try_lock(descriptor: int) -> bool:
    """Lock an open file (flock(2)) unless another process holds it. The kernel frees it when the holder ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(descriptor: int) -> None:
    """Free what `try_lock` locked. Closing is not enough where a child forked meanwhile has the file open too."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)


def hold_lock(path: str | Path, busy: str, advice: str) -> TextIO:
    """Hold a lock file, made where it is missing, until the returned file is closed or this process ends.

    Raises ConfigError where another process holds it: `busy` says of what, `advice` what to do. Raises OSError.
    """
    handle = open_lock(path)
    if not try_lock(handle.fileno()):
        with handle:
            handle.seek(0)
            holder = handle.readline(_HOLDER_CHARS).strip() or "unknown"
        raise ConfigError(f"{busy} (process {holder}); {advice}")
    with suppress(OSError):  # a full disk: the lock holds, and only the sentence above lacks its holder
        handle.truncate(0)
        handle.write(f"{os.getpid()} on {os.uname().nodename}\n")
        handle.flush()
    return handle
