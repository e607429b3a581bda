"""The folder of a checkpoint: its place, its list of files, and its state. Imports no torch, so tools start quickly.

A checkpoint may come from an untrusted source. A file is read only if `COMPLETE` lists it and it is a regular file in
the checkpoint's own folder, and the bytes that are parsed are the ones that were hashed.
"""

from __future__ import annotations

import math
import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

import xxhash

from pretrain.checkpoint.state import FORMAT_VERSION as FORMAT_VERSION
from pretrain.checkpoint.state import Complete, FileEntry, RunState
from pretrain.errors import ConfigError, RunError
from pretrain.files import open_regular, read_at_most
from pretrain.remote import as_path, check_url, guards, is_url, redact
from pretrain.stored import parse, parse_plain

COMPLETE = "COMPLETE"
STATE = "state.json"
READ_BYTES = 16 << 20
MAX_JSON_BYTES = 256 << 20
"""Size limit of COMPLETE and of state.json. Those of a 70B model on 4,096 ranks have about 1 MB."""


class CheckpointError(RunError):
    """A checkpoint could not be written, or it is damaged."""


def root_of(run_dir: str | Path, target: str | None) -> Path:
    """The folder or URL that holds a run's checkpoints: `target` (`checkpoint.target`), or the run folder without it.

    Raises ConfigError where the URL's scheme is not supported or the package for it is not installed.
    """
    if target is None:
        return Path(run_dir)
    if not is_url(target):
        return Path(as_path(target))
    check_url("checkpoint.target", target)
    from upath import UPath

    try:
        root = UPath(target, **guards(target))
        _ = root.fs
    except (ValueError, ImportError) as error:
        raise ConfigError(f"checkpoint.target={target} cannot be used: {error}") from error
    return root  # type: ignore[return-value]


def checkpoint_path(root: Path, step: int) -> Path:
    """The folder of the checkpoint that is saved after `step`."""
    return root / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(root: Path) -> list[Path]:
    """The published checkpoint folders, oldest first. They are not verified."""
    folder = root / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))


def step_of(path: Path) -> int:
    """The step number in the name of a checkpoint folder."""
    return int(path.name.removeprefix("step-"))


def is_remote(path: Path) -> bool:
    """Whether a path is in an object store, which has no rename and no fsync."""
    return not isinstance(path, os.PathLike)


def root_of_run(run_dir: Path, target: str | None = None, key: str = "checkpoint_target") -> Path:
    """The root of an existing run's checkpoints: `target` from the command line, or the one that config.json names.

    A URL in config.json is not opened: the run may come from someone else, who would learn who opens it, or could make
    this host send requests. Raises ConfigError for such a URL, naming the command-line `key` that opens it, and for an
    invalid config.json.
    """
    if target is not None:
        return root_of(run_dir, target)
    path = run_dir / "config.json"
    if not path.exists():
        return run_dir
    what = "the configuration of a run"
    match parse_plain(read_bytes(path), str(path), what):
        case {"checkpoint": {"target": str() | None as stored}}:
            pass
        case _:
            raise ConfigError(f"{path} is not {what}: checkpoint.target is not a string")
    if stored is not None and is_url(stored):
        raise ConfigError(
            f"run_dir={run_dir} keeps its checkpoints at {redact(stored)!r}; a URL from a run folder is opened only if "
            f"the command line names it too: {key}=URL"
        )
    return root_of(run_dir, stored)


def hash_file(path: Path) -> str:
    """The xxh3-128 hash of a regular file, in hexadecimal. Raises the errors of `open_file`."""
    with open_file(path) as file:
        return _hash(file)


def _hash(file: BinaryIO) -> str:
    digest = xxhash.xxh3_128()
    while block := file.read(READ_BYTES):
        digest.update(block)
    return digest.hexdigest()


def open_file(path: Path) -> BinaryIO:
    """Open a file of a checkpoint or run. Raises ConfigError unless it is a regular file, and OSError."""
    if is_remote(path):
        return path.open("rb")
    if path.is_symlink():
        raise ConfigError(f"{path.name} is a link; put the file itself there")
    return open_regular(path)


def read_bytes(path: Path) -> bytes:
    """The content of a JSON file of a checkpoint or run.

    Raises ConfigError where the file is too large or not a regular file, and OSError.
    """
    with open_file(path) as file:
        content = read_at_most(file, MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ConfigError(f"{path.name} has more than {MAX_JSON_BYTES:,} bytes")
    return content


def listing(path: Path) -> dict[str, FileEntry]:
    """The size and hash of each file in COMPLETE. Raises ConfigError where COMPLETE is invalid, and OSError."""
    files = parse(Complete, read_bytes(path / COMPLETE), COMPLETE, "a list of files").files
    if STATE not in files:
        raise ConfigError(f"{COMPLETE} does not list {STATE}")
    return files


def unlisted(path: Path, files: dict[str, FileEntry]) -> list[str]:
    """Names of the files in a checkpoint's folder that COMPLETE does not list."""
    # On NFS, a file that is deleted while another host has it open is kept under a name that starts with .nfs.
    names = (entry.name for entry in path.iterdir())
    return sorted(name for name in names if name not in (COMPLETE, *files) and not name.startswith(".nfs"))


def file_problem(folder: Path, name: str, entry: FileEntry) -> str | None:
    """What is wrong with a file that COMPLETE lists as `entry`; None where it is intact."""
    path = folder / name
    try:
        with open_file(path) as file:
            size_bytes = path.stat().st_size if is_remote(path) else os.fstat(file.fileno()).st_size
            if size_bytes != entry.bytes:
                return f"{name} has {size_bytes} bytes, not {entry.bytes}"
            if _hash(file) != entry.xxh3_128:
                return f"{name} differs from what was written (hash mismatch)"
    except FileNotFoundError:
        return f"{name} is missing"
    except ConfigError as error:
        return str(error)
    return None


def stamp(path: Path) -> tuple[int, int, int]:
    """Size in bytes, and mtime and ctime in ns, of a local file; a change or replacement of the file changes them."""
    found = os.stat(path, follow_symlinks=False)
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{path.name} is not a regular file")
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def read_state(path: Path, files: dict[str, FileEntry] | None = None) -> RunState:
    """The state.json of a checkpoint whose COMPLETE lists `files`. It parses the same bytes that it hashes.

    Raises CheckpointError where the hash differs, the content is invalid, or the content claims more weights than the
    files can hold.
    """
    try:
        files = listing(path) if files is None else files
        content = read_bytes(path / STATE)
        if xxhash.xxh3_128(content).hexdigest() != files[STATE].xxh3_128:
            raise ConfigError(f"{STATE} differs from what was written (hash mismatch)")
        state = parse(RunState, content, STATE, "the state of a run")
    except (OSError, ConfigError) as error:
        raise CheckpointError(f"{path.name}: {error}") from error
    width = 2 if state.get("weights_only") == "bf16" else 4
    n_bytes = width * sum(math.prod(shape) for shape in state["tensors"].values())
    held_bytes = sum(entry.bytes for entry in files.values())
    if n_bytes > held_bytes:
        raise CheckpointError(
            f"{path.name}: {STATE} lists weights of {n_bytes:,} bytes, but the files have only {held_bytes:,}"
        )
    return state


def newest_state(run_dir: Path, target: str | None = None) -> RunState:
    """The state.json of a run's newest checkpoint whose state matches its hash. The tensors are not verified.

    `target` is the run's `checkpoint.target` where that is a URL. Raises ConfigError where there is no such checkpoint.
    """
    problems = []
    for path in reversed(list_checkpoints(root_of_run(run_dir, target))):
        try:
            return read_state(path)
        except CheckpointError as error:
            problems.append(str(error))
    raise ConfigError(
        f"run_dir={run_dir} has no checkpoint that can be read ({'; '.join(problems) or 'none exists'})"
    )
