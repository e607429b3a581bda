"""Checkpoints that belong to no cluster: what is saved, how it is published, verified, kept, found and loaded.

`<run_dir>/checkpoints/step-00001000/` holds

- `shard-*.safetensors`: the fp32 weights and Adam moments as flattened, named tensors, one file per rank that wrote,
  by torch.distributed.checkpoint; any number of ranks reads them;
- `state.json`: step, tokens, sample order, config, shapes, versions;
- `COMPLETE`: size and xxh3-128 of every file, written last.

The folder is written under a temporary name, synced, then renamed: it is complete or it does not exist. Nothing in it
is parsed before its hash matches, and nothing in it is a pickle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from pretrain.config import CheckpointConfig, ConfigError, RunError, TrainConfig, validate
from pretrain.distributed import Partition, World, gather_objects, share
from pretrain.manifest import sync_folder

FORMAT_VERSION = 1
COMPLETE = "COMPLETE"
STATE = "state.json"
READ_BYTES = 16 << 20
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
T = TypeVar("T")


class CheckpointError(RunError):
    """A checkpoint could not be written, or none that is left can be trusted."""


@dataclass(frozen=True)
class Found:
    """The newest checkpoint that verified, and why newer ones were passed over."""

    path: Path | None
    passed_over: list[str] = field(default_factory=list)
    """One sentence per checkpoint that was refused, newest first."""


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step`."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Published checkpoint folders, oldest first; not verified."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))


def step_of(path: Path) -> int:
    """Step of a checkpoint folder."""
    return int(path.name.removeprefix("step-"))


# ---- writing ---------------------------------------------------------------------------------------------------------


def save(
    run_dir: Path, step: int, partitions: dict[str, Partition], state: dict[str, Any], world: World
) -> Path:
    """Write and publish one checkpoint; all ranks call this together and return when it is durable.

    `partitions` is `Engine.snapshot()`; `state` goes to state.json and is rank 0's. Raises CheckpointError on every
    rank when any rank failed; then nothing is published and the temporary folder is gone.
    """
    final = checkpoint_path(run_dir, step)
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        _together(world, lambda: _empty_folder(temporary) if world.is_main else None)
        _write_tensors(temporary, partitions, world)
        hashes = _together(world, lambda: _sync_and_hash(temporary, _own_files(temporary, world)))
        files = {name: entry for one in hashes for name, entry in one.items()}
        _together(world, lambda: _publish(temporary, final, files, state) if world.is_main else None)
    except CheckpointError:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def retain(run_dir: Path, policy: CheckpointConfig, world: World) -> list[Path]:
    """Delete what the policy does not keep, once the newest checkpoint has been read back and verified."""
    paths = list_checkpoints(run_dir)
    surplus = [
        path
        for path in paths[: -policy.keep_last]
        if not policy.keep_every_steps or step_of(path) % policy.keep_every_steps
    ]
    if not surplus or verify(paths[-1], world) is not None:
        return []
    if world.is_main:
        for path in surplus:
            # Without COMPLETE the folder is no checkpoint, so a deletion that is cut short leaves nothing half valid.
            (path / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
    return surplus


def _write_tensors(folder: Path, partitions: dict[str, Partition], world: World) -> None:
    tensors = _as_dtensors({key: (p.values, p.numel) for key, p in partitions.items()}, world)
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            dcp.save(tensors, storage_writer=writer)
    except CheckpointException as error:  # raised on every rank, with every failed rank's own error inside
        causes = "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in error.failures.items())
        raise CheckpointError(f"writing {folder.parent} failed: {causes}") from error


def _as_dtensors(locals_: dict[str, tuple[torch.Tensor, int]], world: World) -> dict[str, torch.Tensor]:
    """ZeRO-3 cuts a flattened tensor exactly as DTensor's Shard(0) does, so one stands for the other."""
    mesh = init_device_mesh("cpu", (world.size,))
    return {
        key: DTensor.from_local(
            values, mesh, [Shard(0)], run_check=False, shape=torch.Size([numel]), stride=(1,)
        )
        for key, (values, numel) in locals_.items()
    }


def _own_files(folder: Path, world: World) -> list[Path]:
    return sorted(folder.glob(f"shard-{world.rank + 1:05d}-*.safetensors"))


def _empty_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _sync_and_hash(folder: Path, paths: list[Path]) -> dict[str, dict[str, Any]]:
    entries = {}
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
        entries[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "xxh3_128": hash_file(path)}
    return entries


def _publish(temporary: Path, final: Path, files: dict[str, Any], state: dict[str, Any]) -> None:
    _write_synced(temporary / STATE, json.dumps({"format_version": FORMAT_VERSION, **state}, indent=1))
    files |= _sync_and_hash(temporary, [temporary / STATE])
    _write_synced(
        temporary / COMPLETE, json.dumps({"format_version": FORMAT_VERSION, "files": files}, indent=1)
    )
    sync_folder(temporary)
    if final.exists():  # one that was refused at the start of this attempt
        shutil.rmtree(final)
    temporary.rename(final)
    sync_folder(final.parent)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def hash_file(path: Path) -> str:
    """xxh3-128 of a file, hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _together(world: World, action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank; when it failed on one, raise CheckpointError on all."""
    problem, value = None, None
    try:
        value = action()
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        problem = f"rank {world.rank}: {error.strerror or error}{where}"
    results = gather_objects((problem, value), world)
    problems = [problem for problem, _ in results if problem]
    if problems:
        raise CheckpointError("; ".join(problems))
    return [value for _, value in results]


# ---- reading ---------------------------------------------------------------------------------------------------------


def find_latest(run_dir: Path, world: World = ALONE, step: int | None = None) -> Found:
    """The newest checkpoint (or that of `step`) whose every hash matches. All ranks together share the reading."""
    passed_over: list[str] = []
    for path in reversed(list_checkpoints(run_dir)):
        if step is not None and step_of(path) != step:
            continue
        problem = verify(path, world)
        if problem is None:
            return Found(path, passed_over)
        passed_over.append(f"{path.name}: {problem}")
    return Found(None, passed_over)


def verify(path: Path, world: World = ALONE) -> str | None:
    """What is wrong with a checkpoint, or None. The files are divided over the ranks; all get the same answer."""
    try:
        listing = json.loads((path / COMPLETE).read_text(encoding="utf-8"))
        version, files = listing["format_version"], listing["files"]
        problem = None if version == FORMAT_VERSION else f"format version {version}, not {FORMAT_VERSION}"
        if problem is None and STATE not in files:
            problem = f"{COMPLETE} does not list {STATE}"
        for index, name in enumerate(sorted(files) if problem is None else []):
            if index % world.size == world.rank and problem is None:
                problem = _file_problem(path, name, files[name])
    except FileNotFoundError:
        problem = f"no {COMPLETE} file"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{COMPLETE} cannot be read ({type(error).__name__}: {error})"
    return next((found for found in gather_objects(problem, world) if found), None)


def _file_problem(folder: Path, name: str, entry: dict[str, Any]) -> str | None:
    if Path(name).name != name:
        return f"{COMPLETE} names a file outside the folder ({name})"
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}"
    if hash_file(path) != entry["xxh3_128"]:
        return f"{name} differs from what was written (hash mismatch)"
    return None


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a verified checkpoint."""
    return json.loads((path / STATE).read_text(encoding="utf-8"))


def load(
    path: Path, keys: list[str], shapes: dict[str, tuple[int, ...]], world: World
) -> dict[str, torch.Tensor]:
    """This rank's share of each tensor of a verified checkpoint, for `Engine.restore`. All ranks together.

    `keys`: the kinds to read (`weight`, `exp_avg`, ...). Raises ConfigError where the model has other tensors.
    """
    saved = {name: tuple(shape) for name, shape in read_state(path)["tensors"].items()}
    for name in sorted(saved.keys() | shapes.keys()):
        if saved.get(name) != shapes.get(name):
            raise ConfigError(
                f"{path} holds another model: {name} is {saved.get(name, 'absent')} there and "
                f"{shapes.get(name, 'absent')} in this configuration; use the model it was trained with"
            )
    targets = {}
    for kind in keys:
        for name, shape in shapes.items():
            numel = torch.Size(shape).numel()
            start, stop = share(numel, world)
            targets[f"{kind}.{name}"] = (torch.zeros(stop - start), numel)
    _read(path, _as_dtensors(targets, world), no_dist=False)
    return {key: values for key, (values, _) in targets.items()}


def _read(path: Path, tensors: dict[str, torch.Tensor], *, no_dist: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=no_dist)


def load_weights(
    run_dir: str | Path, step: int | None = None
) -> tuple[TrainConfig, dict[str, torch.Tensor], dict[str, Any]]:
    """Config, fp32 weights by parameter name at full shape, and state.json of a run's newest good checkpoint.

    In one process, without a process group. Raises ConfigError where there is no such checkpoint.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ConfigError(f"run_dir={run_dir} does not exist")
    found = find_latest(run_dir, step=step)
    if found.path is None:
        which = f"of step {step} " if step is not None else ""
        why = f" ({'; '.join(found.passed_over)})" if found.passed_over else ""
        raise ConfigError(f"run_dir={run_dir} holds no usable checkpoint {which}under checkpoints/{why}")
    state = read_state(found.path)
    shapes = {name: torch.Size(shape) for name, shape in state["tensors"].items()}
    flat = {f"weight.{name}": torch.zeros(shape.numel()) for name, shape in shapes.items()}
    _read(found.path, dict(flat), no_dist=True)
    weights = {name: flat[f"weight.{name}"].view(shape) for name, shape in shapes.items()}
    return validate(TrainConfig, state["config"]), weights, state
