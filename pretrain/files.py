"""Files are read and written as if someone had put links, pipes and huge files in their place.

Reading: a regular file, at most as large as expected, opened once and never waited for. Writing: a link is never
followed, a temporary file is always new, and a file is there as a whole or not at all.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, TextIO

from pretrain.errors import ConfigError

_READ_BYTES = 1 << 20

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


def open_lock(path: str | Path) -> TextIO:
    """A file to be locked, made where it is missing, whose words can be read and replaced. Raises OSError."""
    return open(open_for_append(path), "a+", encoding="utf-8")


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


def write_atomically(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a file that is there as a whole or not at all, synced to disk. `mode` as for `create_file`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with create_file(temporary, mode) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames within a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
