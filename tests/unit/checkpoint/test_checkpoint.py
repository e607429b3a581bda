"""What makes a checkpoint trusted, refused, kept or deleted; in one process. Ranks: test_engine, test_training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.checkpoint import tensors as checkpoint
from pretrain.checkpoint.saver import retain
from pretrain.checkpoint.tensors import ALONE, CheckpointError
from pretrain.config import CheckpointConfig
from pretrain.distributed import Partition, World, share
from pretrain.errors import ConfigError
from support.run_states import run_state

pytestmark = pytest.mark.usefixtures("process_group")

SHAPES = {"a.weight": (3, 5), "b.weight": (7,)}
KEYS = [f"weight.{name}" for name in SHAPES]


def save(run_dir: Path, step: int) -> int:
    partitions = {
        f"weight.{name}": Partition(
            torch.arange(torch.Size(shape).numel(), dtype=torch.float32) + step, torch.Size(shape).numel()
        )
        for name, shape in SHAPES.items()
    }
    return checkpoint.save(run_dir, step, partitions, run_state(step, SHAPES), ALONE)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for step in (10, 20, 30):
        save(tmp_path, step)
    return tmp_path


def test_round_trip(run_dir: Path) -> None:
    found = checkpoint.find_latest(run_dir)
    assert found.path == checkpoint.checkpoint_path(run_dir, 30)
    assert found.passed_over == []
    assert checkpoint.read_state(found.path)["step"] == 30
    tensors = checkpoint.load(found.verified, KEYS, SHAPES, ALONE)
    assert torch.equal(tensors["weight.a.weight"], torch.arange(15.0) + 30)
    assert torch.equal(tensors["weight.b.weight"], torch.arange(7.0) + 30)


def damage(path: Path, how: str) -> str:
    """Break one file of a checkpoint; returns a part of the sentence that must be said of it."""
    shard = next(path.glob("*.safetensors"))
    match how:
        case "flip":
            content = bytearray(shard.read_bytes())
            content[-1] ^= 1
            shard.write_bytes(content)
            return f"{shard.name} differs from what was written"
        case "truncate":
            shard.write_bytes(shard.read_bytes()[:-1])
            return "bytes, not"
        case "missing":
            shard.unlink()
            return f"{shard.name} is missing"
        case "state":
            state = path / "state.json"
            state.write_text(state.read_text().replace('"step": 30', '"step": 31'))
            return "state.json differs"
        case "no marker":
            (path / "COMPLETE").unlink()
            return "COMPLETE is missing"
        case "empty marker":
            (path / "COMPLETE").write_text("")
            return "COMPLETE is not a list of files"
        case "marker of nothing":
            (path / "COMPLETE").write_text('{"format_version": 1, "files": {}}')
            return "does not list state.json"
        case "newer format":
            (path / "COMPLETE").write_text('{"format_version": 2, "files": {}}')
            return "format_version is 2"
        case _:
            marker = json.loads((path / "COMPLETE").read_text())
            marker["files"]["../../outside"] = {"bytes": 1, "xxh3_128": "0" * 32}
            (path / "COMPLETE").write_text(json.dumps(marker))
            return "should be file name"


@pytest.mark.parametrize(
    "how",
    [
        "flip",
        "truncate",
        "missing",
        "state",
        "no marker",
        "empty marker",
        "marker of nothing",
        "newer format",
        "path outside",
    ],
)
def test_damaged_newest_is_passed_over_and_named(run_dir: Path, how: str) -> None:
    reason = damage(checkpoint.checkpoint_path(run_dir, 30), how)
    found = checkpoint.find_latest(run_dir)
    assert found.path == checkpoint.checkpoint_path(run_dir, 20)
    assert len(found.passed_over) == 1
    assert found.passed_over[0].startswith("step-00000030: ")
    assert reason in found.passed_over[0]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(where=st.floats(0, 0.999), bit=st.integers(0, 7))
def test_any_flipped_bit_of_any_file_is_noticed(run_dir: Path, where: float, bit: int) -> None:
    path = checkpoint.checkpoint_path(run_dir, 30)
    files = sorted(path.iterdir())
    file = files[int(where * len(files))]
    whole = file.read_bytes()
    content = bytearray(whole)
    content[int(where * len(files) % 1 * len(content))] ^= 1 << bit
    file.write_bytes(content)
    noticed = checkpoint.verify(path)
    file.write_bytes(whole)
    # A flip within the white space or the name `format_version`... of COMPLETE may leave its meaning as it is.
    assert noticed is not None or json.loads(content) == json.loads(whole)


def test_a_given_step(run_dir: Path) -> None:
    assert checkpoint.find_latest(run_dir, step=20).path == checkpoint.checkpoint_path(run_dir, 20)
    assert checkpoint.find_latest(run_dir, step=25).path is None


def test_no_temporary_folder_is_a_checkpoint(run_dir: Path) -> None:
    shutil.copytree(checkpoint.checkpoint_path(run_dir, 30), run_dir / "checkpoints" / ".step-00000040.tmp")
    assert checkpoint.find_latest(run_dir).path == checkpoint.checkpoint_path(run_dir, 30)


def test_saving_a_step_again_replaces_a_refused_one(run_dir: Path) -> None:
    damage(checkpoint.checkpoint_path(run_dir, 30), "flip")
    save(run_dir, 30)
    assert checkpoint.find_latest(run_dir).path == checkpoint.checkpoint_path(run_dir, 30)


def test_failed_save_publishes_nothing(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device", "state.json")

    monkeypatch.setattr(
        checkpoint, "_write_synced", no_space
    )  # a mock; the real full disk is in test_training
    with pytest.raises(CheckpointError, match=r"rank 0: No space left on device \(state.json\)"):
        save(run_dir, 40)
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == [
        "step-00000010",
        "step-00000020",
        "step-00000030",
    ]


def steps(run_dir: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(run_dir)]


def test_retention_keeps_the_newest_and_the_multiples(run_dir: Path) -> None:
    save(run_dir, 40)
    deleted = retain(run_dir, CheckpointConfig(keep_last=1, keep_every_steps=20), ALONE)
    assert [checkpoint.step_of(path) for path in deleted] == [10, 30]
    assert steps(run_dir) == [20, 40]
    retain(run_dir, CheckpointConfig(keep_last=1), ALONE)
    assert steps(run_dir) == [40]


def test_nothing_is_deleted_while_the_newest_is_bad(run_dir: Path) -> None:
    damage(checkpoint.checkpoint_path(run_dir, 30), "flip")
    assert retain(run_dir, CheckpointConfig(keep_last=1), ALONE) == []
    assert steps(run_dir) == [10, 20, 30]


def test_another_model_is_refused(run_dir: Path) -> None:
    found = checkpoint.find_latest(run_dir).verified
    with pytest.raises(ConfigError, match=r"b\.weight is \(7,\) there and \(8,\)"):
        checkpoint.load(found, KEYS, SHAPES | {"b.weight": (8,)}, ALONE)
    with pytest.raises(ConfigError, match=r"c\.weight is absent there and \(1,\)"):
        checkpoint.load(found, KEYS, SHAPES | {"c.weight": (1,)}, ALONE)


@pytest.mark.parametrize("missing", ["folder", "checkpoints"])
def test_load_weights_without_a_checkpoint(tmp_path: Path, missing: str) -> None:
    where = tmp_path / "none" if missing == "folder" else tmp_path
    with pytest.raises(
        ConfigError, match="does not exist" if missing == "folder" else "no usable checkpoint"
    ):
        checkpoint.load_weights(where)


@given(numel=st.integers(1, 1000), ranks=st.integers(1, 17))
def test_shares_cover_a_tensor_once(numel: int, ranks: int) -> None:
    cuts = [share(numel, World(rank, ranks, 0, torch.device("cpu"))) for rank in range(ranks)]
    assert [i for start, stop in cuts for i in range(start, stop)] == list(range(numel))
    chunks = [len(c) for c in torch.arange(numel).chunk(ranks)]  # as DTensor's Shard(0) cuts
    assert [stop - start for start, stop in cuts][: len(chunks)] == chunks
