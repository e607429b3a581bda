"""Reads and writes files safely, even if someone has put a link, a pipe or a huge file in their place.

Reading opens a regular file only, does so once, never blocks, and reads no more than expected. Writing never follows a
link and never reuses a temporary file. A file that is written atomically is either complete or not there at all.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO, TextIO

from pretrain.errors import ConfigError

_READ_BYTES = 1 << 20
_HOLDER_CHARS = 200
"""At most this many characters of a lock file, which names its holder, are read."""

# ---- reading ---------------------------------------------------------------------------------------------------------


def open_regular(path: str | Path, inside: Path | None = None) -> BinaryIO:
    """Open a regular file for reading. Links are followed, but if `inside` is given, only to files in that folder.

    Raises ConfigError for a pipe, a device or a folder, and for a link out of `inside`. Raises OSError.
    """
    # Without O_NONBLOCK, opening a named pipe would wait for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    # The open file is checked, not `path`, which may lead elsewhere by now.
    opened, problem = Path(f"/proc/self/fd/{descriptor}"), None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        problem = "cannot be read: it is not a regular file"
    elif inside is not None and not is_inside(opened, inside):
        problem = f"is a link to a file outside of {inside}; put the file itself there"
    if problem is not None:
        os.close(descriptor)
        raise ConfigError(f"{path} {problem}")
    return open(descriptor, "rb")


def read_capped(path: str | Path, max_bytes: int, inside: Path | None = None) -> bytes:
    """The content of a regular file of at most `max_bytes`. A larger one is refused before memory is taken for it.

    Raises ConfigError for a larger file and for what `open_regular` refuses. Raises OSError.
    """
    with open_regular(path, inside) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        content = read_at_most(file, max_bytes + 1) if size_bytes <= max_bytes else b""
    if max(size_bytes, len(content)) > max_bytes:  # files in /proc claim to be empty
        raise ConfigError(
            f"{path} has {max(size_bytes, len(content)):,} bytes, where at most {max_bytes:,} are expected; it is not "
            "the file that it should be"
        )
    return content


def read_at_most(file: IO[bytes], n_bytes: int) -> bytes:
    """The next `n_bytes` of a file, or fewer at its end. Unlike `read`, allocates memory only for bytes that exist."""
    blocks: list[bytes] = []
    left = n_bytes
    while left and (block := file.read(min(left, _READ_BYTES))):
        blocks.append(block)
        left -= len(block)
    return b"".join(blocks)


def read_lines(path: str | Path) -> list[str]:
    """The lines of a UTF-8 file, without their ends and without a byte-order mark.

    Only \\n and \\r\\n end a line. `str.splitlines` also splits at characters that may stand within a line, such as
    U+2028. Raises OSError and UnicodeDecodeError.
    """
    lines = Path(path).read_bytes().decode("utf-8-sig").split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path leads to a place within a folder once all links are followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def refuse_links(folder: Path, inside: Path, advice: str, leave_out: str = "") -> None:
    """Raise ConfigError where `folder`, or anything in it, is a link that leads out of the folder `inside`.

    This is for folders that are written into and may have been made by others: a link there could redirect a write.
    `advice` tells the user what to do instead of the link. Folders below `folder` that match the pattern `leave_out`
    are not searched; nothing must be written into them any more.
    """
    closed = set(folder.glob(leave_out)) if leave_out else set()
    places = [folder]
    while places:
        place = places.pop()
        if place.is_symlink() and not is_inside(place, inside):
            raise ConfigError(f"{place} is a link out of its folder, to {os.readlink(place)}; {advice}")
        if place not in closed and (place is folder or not place.is_symlink()):
            # Another process may remove a folder during the search.
            with suppress(FileNotFoundError), os.scandir(place) as entries:
                places += [Path(e.path) for e in entries if e.is_symlink() or e.is_dir(follow_symlinks=False)]


# ---- writing ---------------------------------------------------------------------------------------------------------


def create_file(path: str | Path, mode: int = 0o666) -> BinaryIO:
    """Create a file and open it for writing. An older file or link of that name is removed; a link's target is kept.

    The umask applies to `mode`. Use 0o600 for a file that may hold a secret. Raises OSError.
    """
    Path(path).unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return open(os.open(path, flags, mode), "wb")


def open_for_append(path: str | Path, mode: int = 0o666) -> int:
    """Open a regular file for appending and reading, and create it if it is missing. Returns a file descriptor.

    Raises OSError, also if `path` is a link or not a regular file.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, mode)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a regular file")
    return descriptor


def touch(path: str | Path) -> None:
    """Create an empty file unless it exists; an existing one is unchanged. Raises OSError."""
    os.close(open_for_append(path))


def let_umask_decide(path: str | Path) -> None:
    """Give a file the default mode, which is 0666 without the bits of the umask.

    safetensors creates its files with mode 0600, so users who may read everything else in the folder could not read
    them.
    """
    status = Path("/proc/self/status").read_text()  # the only way to know the umask without changing it
    umask = int(status.partition("Umask:")[2].split()[0], 8)
    os.chmod(path, 0o666 & ~umask)


@contextmanager
def written_atomically(path: Path, *, durable: bool, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A new file to write to, which replaces `path` when the block ends without an exception.

    If this process is killed, either the old file or the complete new one is there. With `durable` this also holds for
    a power cut: the content is synced to the disk before the file is renamed, and the rename before this returns.
    Without it no sync is paid for. `mode` is that of `create_file`. Raises OSError.
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
    """Write a file that is either complete or not there at all. For the options see `written_atomically`."""
    with written_atomically(path, durable=durable, mode=mode) as file:
        file.write(content)


def sync_folder(folder: Path) -> None:
    """Sync a folder to the disk, so that renames within it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- locks -----------------------------------------------------------------------------------------------------------


def open_lock(path: str | Path) -> TextIO:
    """Open a file that is to be locked, and create it if it is missing. It can be read and written. Raises OSError."""
    return open(open_for_append(path), "a+", encoding="utf-8")


def try_lock(descriptor: int) -> bool:
    """Lock an open file with flock(2). Returns False if another process holds the lock, which ends with its holder."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(descriptor: int) -> None:
    """Release the lock. Closing the file is not enough if a child that was forked meanwhile has it open, too."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)


def hold_lock(path: str | Path, busy: str, advice: str) -> TextIO:
    """Lock a file, which is created if it is missing, until the returned file is closed or this process ends.

    Raises ConfigError if another process holds the lock. Its message consists of `busy`, which says what is in use,
    the holder, and `advice`, which tells the user what to do. Raises OSError.
    """
    handle = open_lock(path)
    if not try_lock(handle.fileno()):
        with handle:
            handle.seek(0)
            holder = handle.readline(_HOLDER_CHARS).strip() or "unknown"
        raise ConfigError(f"{busy} (process {holder}); {advice}")
    with suppress(OSError):  # on a full disk the lock still holds; only its holder cannot be named
        handle.truncate(0)
        handle.write(f"{os.getpid()} on {os.uname().nodename}\n")
        handle.flush()
    return handle


def exchange(one: Path, other: Path) -> None:
    """Let two files or folders change places, in a single step. Raises OSError, also where the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    here, exchanging = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), exchanging) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one))


@contextmanager
def published_together(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output`, which replaces `output` when the block ends without an error."""
    output = output.absolute()
    temporary = output.with_name(f".{output.name}.tmp")
    replaced = output.with_name(f".{output.name}.old")
    for leftover in (temporary, replaced):
        _remove(leftover)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.iterdir():
            if path.is_file():
                let_umask_decide(path)
        for path in [*temporary.iterdir(), temporary]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        if output.exists():
            output.rename(replaced)
        temporary.rename(output)
        sync_folder(output.parent)  # the new folder must be durable before the old one is deleted
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove(path: Path) -> None:
    """Delete a folder and its content. Of a link to a folder, only the link is deleted."""
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)
