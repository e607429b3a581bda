"""The folder of a checkpoint: where it is, what it lists, its state. Imports no torch: tools start at once."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import xxhash

from pretrain.config import ConfigError, RunError

FORMAT_VERSION = 1
COMPLETE = "COMPLETE"
STATE = "state.json"
READ_BYTES = 16 << 20
MAX_JSON_BYTES = 256 << 20
"""COMPLETE and state.json are refused above this; those of a 70B model on 4,096 ranks have about 1 MB."""


class CheckpointError(RunError):
    """A checkpoint could not be written, or none that is left can be trusted."""


def root_of(run_dir: str | Path, target: str | None) -> Path:
    """Where a run keeps its checkpoints: `checkpoint.target`, a folder or any fsspec URL, else the run folder.

    Raises ConfigError where the URL's kind is unknown or the package for it is not installed.
    """
    if target is None:
        return Path(run_dir)
    from upath import UPath

    try:
        root = UPath(target)
        _ = root.fs
    except (ValueError, ImportError) as error:
        raise ConfigError(f"checkpoint.target={target} cannot be used: {error}") from error
    return root  # type: ignore[return-value]


def checkpoint_path(root: Path, step: int) -> Path:
    """Folder of the checkpoint after `step`."""
    return root / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Published checkpoint folders, oldest first; not verified."""
    folder = root / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))


def step_of(path: Path) -> int:
    """Step of a checkpoint folder."""
    return int(path.name.removeprefix("step-"))


def is_remote(path: Path) -> bool:
    """Whether a path is on a store without rename and fsync."""
    return not isinstance(path, os.PathLike)


def root_of_run(run_dir: Path) -> Path:
    """The root of an existing run's checkpoints, from its config.json."""
    path = run_dir / "config.json"
    config = json.loads(read_text(path)) if path.exists() else {}
    return root_of(run_dir, config.get("checkpoint", {}).get("target"))


def hash_file(path: Path) -> str:
    """xxh3-128 of a file, hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def listing(path: Path) -> dict[str, dict[str, Any]]:
    """What COMPLETE says of each file."""
    content = json.loads(read_text(path / COMPLETE))
    if content["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format version {content['format_version']}, not {FORMAT_VERSION}")
    for name in content["files"]:
        if Path(name).name != name:
            raise ValueError(f"it names a file outside the folder, {name}")
    return content["files"]


def read_text(path: Path) -> str:
    """A JSON file of a checkpoint or run. Raises ValueError for one that is too large, and OSError."""
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} has {size} bytes, more than {MAX_JSON_BYTES}")
    return path.read_text(encoding="utf-8")


def file_problem(folder: Path, name: str, entry: dict[str, Any]) -> str | None:
    """What is wrong with a listed file, or None."""
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}"
    if hash_file(path) != entry["xxh3_128"]:
        return f"{name} differs from what was written (hash mismatch)"
    return None


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a verified checkpoint. Raises CheckpointError where it claims what the files cannot hold."""
    try:
        state = json.loads(read_text(path / STATE))
        sizes = [n for shape in state["tensors"].values() for n in shape]
        n_bytes = 4 * sum(math.prod(shape) for shape in state["tensors"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path / STATE} is no state of a run ({type(error).__name__}: {error})"
        ) from error
    held_bytes = sum(entry["bytes"] for entry in listing(path).values())
    if not all(type(n) is int and n >= 0 for n in sizes) or n_bytes > held_bytes:
        raise CheckpointError(
            f"{path / STATE} speaks of weights of {n_bytes:,} bytes, where the files have {held_bytes:,}"
        )
    return state


def newest_state(run_dir: Path) -> dict[str, Any]:
    """state.json of a run's newest checkpoint whose state matches its hash; the tensors are not looked at.

    Raises ConfigError where there is none.
    """
    problems = []
    for path in reversed(list_checkpoints(root_of_run(run_dir))):
        try:
            problem = file_problem(path, STATE, listing(path)[STATE])
            if problem is None:
                return read_state(path)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            problem = f"{COMPLETE} cannot be read ({type(error).__name__}: {error})"
        problems.append(f"{path.name}: {problem}")
    raise ConfigError(
        f"run_dir={run_dir} has no checkpoint that can be read ({'; '.join(problems) or 'none'})"
    )
