"""Turns old checkpoints into checkpoints of weights only, which take a third of the space or a sixth.

A thinned checkpoint has `weight.<name>` (and `ema.<name>`, if the run kept an average) and no moments. It can be
evaluated, exported and trained from with init_from, but no run goes on from it. It is written under a temporary name,
synced, read back and compared, and then changes places with the whole one in a single step of the file system. So a
process that is killed leaves either of them, and training may go on meanwhile.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pretrain.checkpoint.folder import (
    COMPLETE,
    FORMAT_VERSION,
    STATE,
    CheckpointError,
    hash_file,
    is_remote,
    list_checkpoints,
    read_state,
    step_of,
)
from pretrain.checkpoint.state import FileEntry, RunState
from pretrain.checkpoint.tensors import Verified, find_latest, verify
from pretrain.config import ScheduleName, ThinDtype, stored_config
from pretrain.errors import ConfigError
from pretrain.files import create_file, exchange, sync_folder
from pretrain.reliability.events import Event, read_events

KEPT_WHOLE = 2
"""Number of newest checkpoints that are never thinned, so that a run resumes even if the newest is damaged."""
_KINDS = ("weight.", "ema.")
_SHARDING = "DCP_SHARDING_INFO"  # where each slice belongs, in the header of a file


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A checkpoint, and what thinning would do to it."""

    path: Path
    bytes_now: int
    """Size of its files."""
    bytes_after: int
    """Size of its weights alone; that of now if it stays as it is."""
    stays: str | None
    """Why it stays as it is; None if it would be thinned."""


def candidates(root: Path, run_dir: Path, dtype: ThinDtype, keep: Iterable[int] = ()) -> list[Candidate]:
    """All checkpoints, oldest first, and which of them would be thinned to `dtype`. Nothing is changed.

    The newest KEPT_WHOLE stay, those from which a decay of the schedule `wsd` begins, and those of the steps in `keep`.
    Raises ConfigError where the checkpoints are at a URL, or a step in `keep` has none.
    """
    if is_remote(root):
        raise ConfigError(
            f"the checkpoints at {root} cannot be thinned: an object store cannot replace a folder in one step; "
            "delete old ones with checkpoint.keep_last, or copy them to a disk"
        )
    states: dict[Path, RunState | str] = {}
    for path in list_checkpoints(root):
        try:
            states[path] = read_state(path)
        except CheckpointError as error:
            states[path] = str(error).removeprefix(f"{path.name}: ")
    steps = {step_of(path) for path in states}
    if absent := sorted(set(keep) - steps):
        raise ConfigError(f"keep={absent}: there is no checkpoint of step {absent[0]}")
    starts = _starts_of_decays({p: s for p, s in states.items() if not isinstance(s, str)}, run_dir)
    newest = sorted(steps)[-KEPT_WHOLE:]
    return [_candidate(path, state, dtype, newest, starts, keep) for path, state in states.items()]


def _candidate(
    path: Path,
    state: RunState | str,
    dtype: ThinDtype,
    newest: list[int],
    starts: set[int],
    keep: Iterable[int],
) -> Candidate:
    step, bytes_now = step_of(path), sum(file.stat().st_size for file in path.iterdir())
    stays, bytes_after = None, bytes_now
    if isinstance(state, str):
        stays = f"damaged: {state}"
    elif state.get("weights_only"):
        stays = f"has weights only ({state['weights_only']})"
    elif step in newest:
        stays = f"one of the newest {KEPT_WHOLE}"
    elif step in starts:
        stays = "the learning rate decays after it"
    elif step in keep:
        stays = "named by keep="
    else:
        n_weights = sum(prod(shape) for shape in state["tensors"].values())
        bytes_after = (2 if dtype is ThinDtype.bf16 else 4) * n_weights * (2 if state.get("ema") else 1)
    return Candidate(path=path, bytes_now=bytes_now, bytes_after=bytes_after, stays=stays)


def _starts_of_decays(states: dict[Path, RunState], run_dir: Path) -> set[int]:
    """The steps of the checkpoints from which a decay begins, in the runs that the checkpoints were saved in.

    A run may have been made longer, so each checkpoint says where its own decay was to begin.
    """
    whole = sorted(step_of(path) for path, state in states.items() if not state.get("weights_only"))
    found = set()
    for path, state in states.items():
        config = stored_config(state["config"], f"{path.name}/{STATE}")
        if config.schedule.name is not ScheduleName.wsd:
            continue
        n_steps = config.n_steps if config.total_epochs is None else _recorded_steps(run_dir)
        start = config.schedule.decay_start_in(n_steps)
        found |= {max((step for step in whole if step <= start), default=0)}
    return found


def _recorded_steps(run_dir: Path) -> int:
    """The length in steps that a run of whole epochs recorded when it started. Raises ConfigError where it did not."""
    lengths = [event.get("n_steps") for event in read_events(run_dir) if event["event"] == Event.STARTED]
    if not lengths or type(lengths[-1]) is not int:
        raise ConfigError(
            f"run_dir={run_dir} has no event {Event.STARTED} with n_steps, so it is not known where the decay of its "
            "learning rate begins"
        )
    return lengths[-1]


def remove_leftovers(root: Path) -> None:
    """Delete what killed processes left. The caller holds the lock."""
    for path in (root / "checkpoints").glob(".step-*.thin"):
        shutil.rmtree(path, ignore_errors=True)


def thin(root: Path, step: int, dtype: ThinDtype) -> int:
    """Replace the checkpoint of a step by one of its weights only. Returns the bytes that this has freed.

    The caller holds the lock. Raises CheckpointError where the checkpoint is damaged, or where anything fails; the
    whole one is then still there.
    """
    found = find_latest(root, step=step)
    if found.verified is None:
        raise CheckpointError("; ".join(found.passed_over) or f"the checkpoint of step {step} is gone")
    path = found.verified.path
    temporary = path.with_name(f".{path.name}.thin")
    try:
        temporary.mkdir()
        _write(found.verified, temporary, dtype)
        if (problem := verify(temporary)) is not None:
            raise CheckpointError(f"{path.name}: the thinned copy is not what was written ({problem})")
        before = sum(entry.bytes for entry in found.verified.files.values())
        after = sum(file.stat().st_size for file in temporary.iterdir())
        exchange(path, temporary)
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path.name} was not thinned: {_told(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after the exchange, this is the whole checkpoint
    return before - after


def _told(error: OSError) -> str:
    if error.errno in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return "this file system cannot replace a folder in one step, as ext4, XFS and Btrfs can; copy the run there"
    return error.strerror or str(error)


def _write(whole: Verified, folder: Path, dtype: ThinDtype) -> None:
    """Write the thinned checkpoint, one file at a time in memory, and compare each with the whole one."""
    files: dict[str, FileEntry] = {}
    for name in sorted(whole.files):
        if name == STATE:
            continue
        tensors, metadata = _weights_in(whole.path / name, dtype)
        if not tensors:
            continue
        save_file(tensors, folder / name, metadata)
        written, _ = _weights_in(folder / name, dtype)
        if not all(torch.equal(tensors[key], written[key]) for key in tensors):
            raise CheckpointError(f"{whole.path.name}: {name} was not written as it is")
        files[name] = _finished(folder / name)
    state = {**whole.state, "weights_only": dtype.value}
    files[STATE] = _write_json(folder / STATE, state)
    listed = {name: asdict(entry) for name, entry in files.items()}
    _write_json(folder / COMPLETE, {"format_version": FORMAT_VERSION, "files": listed})
    sync_folder(folder)


def _weights_in(path: Path, dtype: ThinDtype) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The weights in a file of tensors, in the type `dtype`, and the metadata of the file without the moments."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        keys = [key for key in file.keys() if key.startswith(_KINDS)]  # noqa: SIM118 (not a dict)
        wanted = torch.bfloat16 if dtype is ThinDtype.bf16 else torch.float32
        tensors = {key: file.get_tensor(key).to(wanted) for key in keys}
    places = json.loads(metadata[_SHARDING])
    metadata[_SHARDING] = json.dumps({key: places[key] for key in keys})
    return tensors, metadata


def _finished(path: Path) -> FileEntry:
    """Sync a file. Returns its size and hash."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileEntry(bytes=path.stat().st_size, xxh3_128=hash_file(path))


def _write_json(path: Path, content: object) -> FileEntry:
    with create_file(path) as file:
        file.write(json.dumps(content, indent=1).encode())
    return _finished(path)
