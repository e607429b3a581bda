"""Saves, publishes, verifies, finds and loads checkpoints, which are portable across clusters and rank counts.

`<run_dir>/checkpoints/step-00001000/` holds

- `shard-*.safetensors`: the fp32 weights and optimizer moments as flattened, named tensors, in at least one file per
  rank, written by torch.distributed.checkpoint; any number of ranks can read them;
- `state.json`: step, tokens, sample order, configuration, shapes, software versions;
- `COMPLETE`: size and xxh3-128 of every other file, written last.

The folder is written under a temporary name, synced and renamed, so it is complete or does not exist. In an object
store, which has no rename, `COMPLETE` is uploaded after all other files. No file is parsed before its hash matches,
none is a pickle, and a folder with a file that `COMPLETE` does not list is refused.

The functions take the root of a run's checkpoints, which `root_of` finds: the run folder or `checkpoint.target`.
torch.distributed.checkpoint and DTensor are imported where they are used, because they import sympy, which costs each
rank a second of CPU time. A run that starts without a checkpoint needs them only when it saves.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.device_mesh import DeviceMesh

from pretrain.checkpoint.folder import (
    COMPLETE,
    FORMAT_VERSION,
    STATE,
    CheckpointError,
    checkpoint_path,
    file_problem,
    hash_file,
    is_remote,
    list_checkpoints,
    listing,
    read_state,
    root_of_run,
    stamp,
    step_of,
    unlisted,
)
from pretrain.checkpoint.state import BaseReference, FileEntry, RunState
from pretrain.config import TrainConfig, Weights, stored_config
from pretrain.distributed import Partition, World, gather_objects, share
from pretrain.errors import ConfigError
from pretrain.files import create_file, sync_folder

FILE_BYTES = 1 << 30
"""Approximate size of the tensor files that a rank writes. It is limited because safetensors builds each in memory."""
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A checkpoint all of whose files have the size and hash that COMPLETE lists."""

    path: Path
    files: dict[str, FileEntry]
    state: RunState
    stamps: dict[str, tuple[int, int, int]]
    """`stamp` of each file, taken before it was hashed. Empty for a remote checkpoint, which is hashed again when it is
    downloaded."""


@dataclass(frozen=True)
class FoundCheckpoint:
    """The newest checkpoint that passed verification, and why newer ones did not."""

    verified: Verified | None
    passed_over: list[str] = field(default_factory=list)
    """One sentence per refused checkpoint that says why, newest first."""

    @property
    def path(self) -> Path | None:
        """The folder of the checkpoint; None where none was found."""
        return self.verified.path if self.verified else None


# ---- writing ---------------------------------------------------------------------------------------------------------


def save(root: Path, step: int, partitions: dict[str, Partition], state: dict[str, Any], world: World) -> int:
    """Write and publish one checkpoint. All ranks call this together, and it returns when the checkpoint is durable.

    `partitions` are those of `EngineState.snapshot()`. Rank 0's `state` is written to state.json. Returns the size of
    the checkpoint in bytes. Raises CheckpointError on every rank when any rank failed; then nothing is published and no
    temporary file is left.
    """
    return save_written(root, step, lambda folder: _write_tensors(folder, partitions, world), state, world)


def save_written(
    root: Path, step: int, write: Callable[[Path], None], state: dict[str, Any], world: World
) -> int:
    """`save` with tensors that `write` puts into the folder it is given, in files named as this rank's."""
    final = checkpoint_path(root, step)
    with _workplace(final, world) as folder:
        write(folder)
        hashes = _together(world, lambda: _finish_files(_own_files(folder, world), final))
        files = {name: entry for one in hashes for name, entry in one.items()}
        _together(world, lambda: _publish(folder, final, files, state) if world.is_main else None)
    return sum(entry.bytes for entry in files.values())


@contextmanager
def _workplace(final: Path, world: World) -> Iterator[Path]:
    """The temporary folder in which a checkpoint is written.

    It lies beside the final folder, shared by all ranks; where the final folder is remote, each rank has its own.
    """
    if is_remote(final):
        folder = Path(tempfile.mkdtemp(prefix="pretrain-checkpoint-"))
        mine = True
        # A refused or incomplete checkpoint of this step may already exist.
        _together(world, lambda: remove(final) if world.is_main else None)
    else:
        folder = final.with_name(f".{final.name}.tmp")
        mine = world.is_main
        _together(world, lambda: _empty_folder(folder) if world.is_main else None)
    try:
        yield folder
    finally:
        if mine:
            shutil.rmtree(folder, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a checkpoint, COMPLETE first, so that an interrupted deletion does not leave a valid-looking
    checkpoint."""
    (path / COMPLETE).unlink(missing_ok=True)
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.fs.rm(path.path, recursive=True)  # type: ignore[attr-defined]


def _write_tensors(folder: Path, partitions: dict[str, Partition], world: World) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    tensors = _as_dtensors({key: (p.values, p.numel) for key, p in partitions.items()}, world)
    files = _file_of_each(partitions, world)
    writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            dcp.save(tensors, storage_writer=writer, process_group=world.group)
    except CheckpointException as error:  # raised on every rank, with the error of each failed rank
        causes = "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in error.failures.items())
        raise CheckpointError(f"writing {folder.parent} failed: {causes}") from error


def _file_of_each(partitions: dict[str, Partition], world: World) -> dict[str, int]:
    """The number of the file that holds each key, counted from 1. The result is the same on all ranks."""
    numbers, number, size = {}, 1, 0
    for key, partition in partitions.items():
        per_rank = -(-partition.numel // world.size) * 4
        if size and size + per_rank > FILE_BYTES:
            number, size = number + 1, 0
        numbers[key] = number
        size += per_rank
    return numbers


def _as_dtensors(locals_: dict[str, tuple[torch.Tensor, int]], world: World) -> dict[str, torch.Tensor]:
    """Each (local values, number of elements) as a DTensor.

    This needs no communication, because ZeRO-3 partitions a flattened tensor exactly as DTensor's Shard(0) does.
    """
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh.from_group(world.group or dist.distributed_c10d._get_default_group(), "cpu")
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


def _finish_files(paths: list[Path], final: Path) -> dict[str, FileEntry]:
    """Hash files, then sync them or, for a remote checkpoint, upload them. Returns size and hash by file name."""
    entries = {}
    for path in paths:
        entries[path.name] = FileEntry(bytes=path.stat().st_size, xxh3_128=hash_file(path))
        if is_remote(final):
            _upload(path, final)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    return entries


def _upload(path: Path, folder: Path) -> None:
    try:
        folder.fs.put_file(str(path), (folder / path.name).path)  # type: ignore[attr-defined]
    except Exception as error:  # every kind of store raises its own exceptions
        raise OSError(f"{folder / path.name} was not uploaded ({type(error).__name__}: {error})") from error


def _publish(folder: Path, final: Path, files: dict[str, FileEntry], state: dict[str, Any]) -> None:
    _write_synced(folder / STATE, json.dumps({"format_version": FORMAT_VERSION, **state}, indent=1))
    files |= _finish_files([folder / STATE], final)
    listed = {name: asdict(entry) for name, entry in files.items()}
    _write_synced(
        folder / COMPLETE, json.dumps({"format_version": FORMAT_VERSION, "files": listed}, indent=1)
    )
    if is_remote(final):
        _upload(folder / COMPLETE, final)
        return
    sync_folder(folder)
    remove(final)  # a checkpoint of this step that was refused when this attempt started
    folder.rename(final)
    sync_folder(final.parent)
    sync_folder(final.parent.parent)  # makes `checkpoints` durable, which the first save creates


def _write_synced(path: Path, text: str) -> None:
    with create_file(path) as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _together(world: World, action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank and return all results. When it fails on any rank, raise CheckpointError on all."""
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


def find_latest(
    root: Path, world: World = ALONE, step: int | None = None, before: int | None = None
) -> FoundCheckpoint:
    """The newest checkpoint all of whose hashes match.

    With `step`, only the checkpoint of that step is considered, and with `before`, only checkpoints of earlier steps
    from which a run can go on.
    All ranks call this together and divide the files that must be hashed.
    """
    passed_over: list[str] = []
    for path in reversed(list_checkpoints(root)):
        if step not in (None, step_of(path)) or (before is not None and step_of(path) >= before):
            continue
        found = _examine(path, world)
        if isinstance(found, Verified) and before is not None and found.state.get("weights_only"):
            found = "it holds weights only"
        if isinstance(found, Verified):
            return FoundCheckpoint(found, passed_over)
        passed_over.append(f"{path.name}: {found}")
    return FoundCheckpoint(None, passed_over)


def verify(path: Path, world: World = ALONE) -> str | None:
    """What is wrong with a checkpoint, or None. The ranks divide the files, and all of them get the same answer."""
    found = _examine(path, world)
    return found if isinstance(found, str) else None


def _examine(path: Path, world: World) -> Verified | str:
    """The verified checkpoint, or what is wrong with it. Each tensor file is hashed by one rank, the state by all."""
    problem, verified = None, None
    try:
        files = listing(path)
        if extra := unlisted(path, files):
            raise ConfigError(f"{COMPLETE} does not list {', '.join(map(repr, extra[:3]))}")
        stamps = {} if is_remote(path) else {name: stamp(path / name) for name in files}
        mine = [name for number, name in enumerate(sorted(files)) if number % world.size == world.rank]
        problem = next(filter(None, (file_problem(path, name, files[name]) for name in mine)), None)
        if problem is None:
            verified = Verified(path=path, files=files, state=read_state(path, files), stamps=stamps)
    except FileNotFoundError as error:
        problem = f"{Path(error.filename).name if error.filename else COMPLETE} is missing"
    except OSError as error:
        problem = f"it cannot be read ({type(error).__name__}: {error})"
    except (ConfigError, CheckpointError) as error:
        problem = str(error).removeprefix(f"{path.name}: ")
    others = next((found for found in gather_objects(problem, world) if found), None)
    if others is not None:
        return others
    assert verified is not None
    return verified


def load(
    verified: Verified,
    keys: list[str],
    shapes: dict[str, tuple[int, ...]],
    world: World,
    *,
    without: Collection[str] = (),
) -> dict[str, torch.Tensor]:
    """This rank's share of each tensor of a checkpoint, for `EngineState.restore`. All ranks call this together.

    `keys` are the tensors to read (`weight.<name>`, `exp_avg.<name>`, ...), and `shapes` those of the model's
    parameters by name. Raises ConfigError where the checkpoint has other parameters or shapes, apart from those named
    in `without`, which are not read, and CheckpointError where its files cannot be read.
    """
    saved = {name: tuple(shape) for name, shape in verified.state["tensors"].items()}
    for name in sorted(saved.keys() | shapes.keys()):
        if name not in without and saved.get(name) != shapes.get(name):
            raise ConfigError(
                f"{verified.path} holds a different model: {name} is {saved.get(name, 'absent')} there and "
                f"{shapes.get(name, 'absent')} in this configuration; use the model that it was trained with"
            )
    targets = {}
    for key in keys:
        if (name := key.split(".", 1)[1]) in without:
            continue
        numel = torch.Size(shapes[name]).numel()
        start, stop = share(numel, world)
        targets[key] = (torch.zeros(stop - start), numel)
    _read(verified, _as_dtensors(targets, world), world, no_dist=False)
    return {key: values for key, (values, _) in targets.items()}


def _read(verified: Verified, tensors: dict[str, torch.Tensor], world: World, *, no_dist: bool) -> None:
    """Fill `tensors` from the files. Raises CheckpointError where they do not match or have changed since hashing."""
    with _listed_files(verified, world) as (folder, listed):
        _fill(verified, folder, tensors, _reader(listed), no_dist=no_dist)


@contextmanager
def _listed_files(verified: Verified, world: World) -> Iterator[tuple[Path, str]]:
    """The folder of a checkpoint on this host, and a folder with links to its listed files only.

    The reader opens every file of its folder, so it gets the second one.
    """
    with (
        _local_copy(verified, world) as folder,
        tempfile.TemporaryDirectory(prefix="pretrain-load-") as listed,
    ):
        for name in verified.files:
            os.symlink(folder.absolute() / name, Path(listed, name))
        yield folder, listed


def _reader(listed: str) -> Any:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dcp.HuggingFaceStorageReader(listed)


def _fill(
    verified: Verified, folder: Path, tensors: dict[str, torch.Tensor], reader: Any, *, no_dist: bool
) -> None:
    import torch.distributed.checkpoint as dcp

    with _damage(verified), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, storage_reader=reader, no_dist=no_dist)
    changed = [name for name, before in verified.stamps.items() if stamp(folder / name) != before]
    if changed:
        raise CheckpointError(
            f"{verified.path.name}: {changed[0]} was changed while it was read; start again"
        )


@contextmanager
def _damage(verified: Verified) -> Iterator[None]:
    """Turn what the reader raises for files that do not fit together into a CheckpointError."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (CheckpointException, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{verified.path.name}: its tensors are not those of its state ({_cause(error)})"
        ) from error


def _cause(error: BaseException) -> str:
    """The cause of a failed read, in one line."""
    failures = getattr(error, "failures", None)
    cause = next(iter(failures.values()))[0] if failures else error
    return " ".join(f"{type(cause).__name__}: {cause}".split())[:300]


@contextmanager
def _local_copy(verified: Verified, world: World) -> Iterator[Path]:
    """The folder of a checkpoint on this host. The ranks of a host download a remote checkpoint together."""
    if not is_remote(verified.path):
        yield verified.path
        return
    hosts = gather_objects(os.uname().nodename, world)
    here = [rank for rank, host in enumerate(hosts) if host == hosts[world.rank]]
    first = world.rank == here[0]
    folders = gather_objects(tempfile.mkdtemp(prefix="pretrain-checkpoint-") if first else None, world)
    folder = Path(folders[here[0]])
    try:
        _together(world, lambda: _download(verified, folder, here.index(world.rank), len(here)))
        yield folder
        gather_objects(None, world)  # a barrier: all ranks have read before the copy is deleted
    finally:
        if first:
            shutil.rmtree(folder, ignore_errors=True)


def _download(verified: Verified, folder: Path, part: int, parts: int) -> None:
    path = verified.path
    for name in sorted(verified.files)[part::parts]:
        try:
            path.fs.get_file((path / name).path, str(folder / name))  # type: ignore[attr-defined]
        except Exception as error:  # every kind of store raises its own exceptions
            raise OSError(f"{path / name} was not downloaded ({type(error).__name__}: {error})") from error
        problem = file_problem(folder, name, verified.files[name])
        if problem is not None:
            raise OSError(f"{path}: {problem}")


def base_root(root: Path) -> Path:
    """The root of the checkpoint with the frozen weights of a run of adapters, whose own checkpoints are in `root`."""
    return root / "base"


def find_base(root: Path, world: World = ALONE, expected: BaseReference | None = None) -> Verified:
    """The frozen weights of a run of adapters. All ranks call this together.

    Raises CheckpointError where they are damaged, or are not the `expected` ones.
    """
    folder = base_root(root)
    found = find_latest(folder, world)
    if found.verified is None:
        raise CheckpointError(
            f"{folder} holds no intact weights ({'; '.join(found.passed_over) or 'none'}), and the adapters of this "
            "run are of no use without them; restore that folder"
        )
    if expected is not None and reference_to(found.verified) != expected:
        raise CheckpointError(
            f"{found.verified.path} holds other weights than those that the adapters of this run were trained on; "
            "restore that folder"
        )
    return found.verified


def reference_to(base: Verified) -> BaseReference:
    """What the checkpoints of a run of adapters say about the weights that they belong to."""
    return BaseReference(step=base.state["step"], complete_xxh3_128=hash_file(base.path / COMPLETE))


class StoredWeights(Mapping[str, torch.Tensor]):
    """The whole fp32 weights of a checkpoint by parameter name, or their moving averages where `kind` is `ema`.

    Each is read from the files whenever it is asked for, so that a model that is larger than memory can be passed
    through it, one weight at a time.
    """

    def __init__(self, verified: Verified, folder: Path, listed: str, kind: str = "weight") -> None:
        self._verified, self._folder, self._reader = verified, folder, _reader(listed)
        self._kind = kind
        self.shapes = {name: torch.Size(shape) for name, shape in verified.state["tensors"].items()}
        """The shape of each weight, known without reading it."""
        with _damage(verified):
            metadata = self._reader.read_metadata()
        # Otherwise each access would read the headers of all files again: one file or more of each rank.
        self._reader.read_metadata = lambda: metadata

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.read([name])[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Several weights at once. Raises CheckpointError where they are damaged, and KeyError."""
        flat = {f"{self._kind}.{name}": torch.zeros(self.shapes[name].numel()) for name in names}
        _fill(self._verified, self._folder, dict(flat), self._reader, no_dist=True)
        weights = {key.removeprefix(f"{self._kind}."): tensor for key, tensor in flat.items()}
        return {name: tensor.view(self.shapes[name]) for name, tensor in weights.items()}


def load_weights(
    run_dir: str | Path,
    step: int | None = None,
    target: str | None = None,
    weights: Weights = Weights.trained,
) -> tuple[TrainConfig, dict[str, torch.Tensor], RunState]:
    """What `open_weights` gives, with all weights in memory."""
    with open_weights(run_dir, step, target, weights) as (config, stored, state):
        return config, stored.read(stored), state


@contextmanager
def open_weights(
    run_dir: str | Path,
    step: int | None = None,
    target: str | None = None,
    weights: Weights = Weights.trained,
) -> Iterator[tuple[TrainConfig, StoredWeights, RunState]]:
    """The configuration, weights and state of a run's newest good checkpoint.

    The weights of a run of adapters are the adapters' only; `open_base_weights` gives the others.

    `weights` chooses between the trained weights and their moving average. With `step`, they come from the checkpoint
    of that step. The function works in a single process, without a process group. `target` is the URL of the
    checkpoints where they are not in the run folder; a remote one is downloaded for the time of the block. Raises
    ConfigError where there is no such checkpoint.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ConfigError(f"run_dir={run_dir} does not exist")
    found = find_latest(root_of_run(run_dir, target), step=step)
    if found.verified is None:
        which = f"of step {step} " if step is not None else ""
        why = f" ({'; '.join(found.passed_over)})" if found.passed_over else ""
        raise ConfigError(f"run_dir={run_dir} holds no usable checkpoint {which}under checkpoints/{why}")
    state = found.verified.state
    config = stored_config(state["config"], f"{found.verified.path.name}/{STATE}")
    if weights is Weights.ema and not state.get("ema"):
        raise ConfigError(
            f"weights=ema: {found.verified.path} has no moving average of the weights, which a run keeps with "
            "ema.decay; leave weights=ema out"
        )
    kind = "ema" if weights is Weights.ema else "weight"
    with _listed_files(found.verified, ALONE) as (folder, listed):
        yield config, StoredWeights(found.verified, folder, listed, kind), state


@contextmanager
def open_base_weights(
    run_dir: str | Path, expected: BaseReference, target: str | None = None
) -> Iterator[StoredWeights]:
    """The frozen fp32 weights of a run of adapters by parameter name, each read when it is used.

    Raises CheckpointError where they are damaged, or are not the `expected` ones.
    """
    found = find_base(root_of_run(Path(run_dir), target), expected=expected)
    with _listed_files(found, ALONE) as (folder, listed):
        yield StoredWeights(found, folder, listed)


def load_base_weights(
    run_dir: str | Path, expected: BaseReference, target: str | None = None
) -> dict[str, torch.Tensor]:
    """What `open_base_weights` gives, with all weights in memory."""
    with open_base_weights(run_dir, expected, target) as stored:
        return stored.read(stored)
