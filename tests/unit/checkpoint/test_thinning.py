"""Thinned checkpoints: which ones, what they hold, who reads them and who refuses them. In one process."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import tensors as checkpoint
from pretrain.checkpoint import thinning
from pretrain.checkpoint.tensors import ALONE, CheckpointError, find_latest, load_weights
from pretrain.checkpoint.thinning import candidates, thin
from pretrain.config import ThinDtype, TrainConfig, Weights, load_config, to_dict
from pretrain.distributed import Partition
from pretrain.errors import ConfigError
from pretrain.train.run import _newest_checkpoint
from support.checkpoints import read_tensors
from support.run_states import run_state
from support.trained_run import script

pytestmark = pytest.mark.usefixtures("process_group")

SHAPES = {"a": (3, 5), "b": (1000,)}
KINDS = ("weight", "exp_avg", "exp_avg_sq")


def save(root: Path, step: int, *overrides: str, kinds: tuple[str, ...] = KINDS) -> Path:
    """A checkpoint of random values, of a run with these overrides."""
    words = [f"run_dir={root}", "data.manifest=unused", "total_steps=100", *overrides]
    config = to_dict(load_config(TrainConfig, words, "config"))
    draw = torch.Generator().manual_seed(step)
    partitions = {
        f"{kind}.{name}": Partition(
            torch.randn(torch.Size(shape).numel(), generator=draw), torch.Size(shape).numel()
        )
        for kind in kinds
        for name, shape in SHAPES.items()
    }
    state = run_state(step, SHAPES, config=config, ema="ema" in kinds)
    checkpoint.save(root, step, partitions, state, ALONE)
    return checkpoint.checkpoint_path(root, step)


def thinnable(root: Path, keep: tuple[int, ...] = ()) -> list[int]:
    found = candidates(root, root, ThinDtype.fp32, keep)
    return [checkpoint.step_of(one.path) for one in found if one.stays is None]


@pytest.mark.parametrize("dtype", ThinDtype)
@pytest.mark.parametrize("kinds", [KINDS, (*KINDS, "ema")])
def test_the_weights_stay_and_the_moments_go(
    tmp_path: Path, dtype: ThinDtype, kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 2000)  # several files, one of them with moments only
    path = save(tmp_path, 1, kinds=kinds)
    for step in (2, 3):
        save(tmp_path, step, kinds=kinds)
    before = read_tensors(path)
    expected_bytes = candidates(tmp_path, tmp_path, dtype)[0].bytes_after
    freed = thin(tmp_path, 1, dtype)
    after = read_tensors(path)
    torch_dtype = torch.bfloat16 if dtype is ThinDtype.bf16 else torch.float32
    kept = {key: value for key, value in before.items() if key.startswith(("weight.", "ema."))}
    assert after.keys() == kept.keys()
    assert all(torch.equal(after[key], value.to(torch_dtype)) for key, value in kept.items())
    assert freed > 0
    assert expected_bytes == sum(value.numel() * torch_dtype.itemsize for value in kept.values())
    assert not list(path.parent.glob(".*"))
    for step in (2, 3):
        checkpoint.remove(checkpoint.checkpoint_path(tmp_path, step))
    assert checkpoint.verify(path) is None
    assert find_latest(tmp_path).verified.state["weights_only"] == dtype.value
    for weights, kind in ((Weights.trained, "weight"), (Weights.ema, "ema")):
        if kind in kinds:
            _, found, _ = load_weights(tmp_path, weights=weights)
            assert all(
                torch.equal(found[name].flatten(), kept[f"{kind}.{name}"].to(torch_dtype).float())
                for name in SHAPES
            )
    loaded = checkpoint.load(find_latest(tmp_path).verified, ["weight.a"], SHAPES, ALONE)  # as init_from does
    assert torch.equal(loaded["weight.a"], kept["weight.a"].to(torch_dtype).float())


def test_the_average_is_asked_of_a_checkpoint_without_one(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"weights=ema: .*step-00000001.*ema\.decay"):
        load_weights(tmp_path, weights=Weights.ema)


def test_the_newest_two_and_what_a_decay_begins_from_stay(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50, 60):
        save(tmp_path, step, "schedule=wsd", "total_steps=50", "schedule.decay_steps=15")
    assert thinnable(tmp_path) == [10, 20, 40]  # the decay begins after step 35
    assert thinnable(tmp_path, keep=(10,)) == [20, 40]
    stays = {checkpoint.step_of(c.path): c.stays for c in candidates(tmp_path, tmp_path, ThinDtype.fp32)}
    assert "decays" in stays[30] and "newest 2" in stays[50] and "newest 2" in stays[60]
    with pytest.raises(ConfigError, match=r"keep=\[11\].*step 11"):
        thinnable(tmp_path, keep=(11,))


def test_a_run_that_was_made_longer_has_two_decays(tmp_path: Path) -> None:
    for step in range(10, 100, 10):
        save(
            tmp_path,
            step,
            "schedule=wsd",
            f"total_steps={50 if step <= 50 else 90}",
            "schedule.decay_steps=20",
        )
    assert thinnable(tmp_path) == [10, 20, 40, 50, 60]


def test_other_schedules_keep_only_the_newest_two(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, "schedule=cosine")
    assert thinnable(tmp_path) == [10]


def test_whole_epochs_are_as_long_as_the_run_recorded(tmp_path: Path) -> None:
    words = ("schedule=wsd", "total_epochs=2", "total_steps=null", "schedule.decay_steps=15")
    for step in (10, 20, 30, 40):
        save(tmp_path, step, *words)
    with pytest.raises(ConfigError, match="n_steps"):
        thinnable(tmp_path)
    (tmp_path / "events.jsonl").write_text(
        json.dumps({"event": "started", "attempt": 1, "n_steps": 40}) + "\n"
    )
    assert thinnable(tmp_path) == [10]


def test_a_damaged_one_stays(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    (checkpoint.checkpoint_path(tmp_path, 10) / "COMPLETE").unlink()
    assert thinnable(tmp_path) == [20]
    (file,) = checkpoint.checkpoint_path(tmp_path, 20).glob("*.safetensors")
    content = file.read_bytes()
    damaged = content[:-1] + bytes([content[-1] ^ 1])
    file.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"step-00000020.*hash mismatch"):
        thin(tmp_path, 20, ThinDtype.fp32)
    assert file.read_bytes() == damaged


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSPC])
def test_what_the_file_system_refuses_changes_nothing(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, 1)
    before = {file.name: file.read_bytes() for file in path.iterdir()}

    def refuse(one: Path, other: Path) -> None:
        raise OSError(number, os.strerror(number), str(one))

    monkeypatch.setattr(thinning, "exchange", refuse)
    with pytest.raises(CheckpointError, match="ext4" if number == errno.EINVAL else "No space left"):
        thin(tmp_path, 1, ThinDtype.fp32)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert list(path.parent.iterdir()) == [path]


def test_a_copy_that_is_not_what_was_written_is_never_put_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, 1)
    before = read_tensors(path)
    write = thinning.save_file

    def lie(tensors: dict[str, torch.Tensor], *rest: object) -> None:
        write({key: value + 1 for key, value in tensors.items()}, *rest)

    monkeypatch.setattr(thinning, "save_file", lie)
    with pytest.raises(CheckpointError, match="was not written as it is"):
        thin(tmp_path, 1, ThinDtype.fp32)
    assert read_tensors(path).keys() == before.keys()


def test_no_run_goes_on_from_it(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    thin(tmp_path, 20, ThinDtype.fp32)
    with pytest.raises(ConfigError, match=r"step-00000020 holds weights only.*init_from="):
        _newest_checkpoint(tmp_path, ALONE)
    found = find_latest(tmp_path, before=30)  # a rollback goes back further
    assert found.path == checkpoint.checkpoint_path(tmp_path, 10)
    assert "weights only" in found.passed_over[0]


def test_the_command_shows_first_and_then_does_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    leftover = tmp_path / "checkpoints" / ".step-00000010.thin"
    shutil.copytree(checkpoint.checkpoint_path(tmp_path, 20), leftover)
    launch = script("thin")
    config = launch.ThinConfig(run_dir=str(tmp_path))
    assert launch.main(config) == 0
    assert "weights_only" not in find_latest(tmp_path, step=10).verified.state
    assert leftover.exists()
    shown = capsys.readouterr().out
    assert "step-00000010" in shown and "apply=true" in shown
    assert launch.main(replace(config, apply=True)) == 0
    assert find_latest(tmp_path, step=10).verified.state["weights_only"] == "fp32"
    assert not leftover.exists()
    assert thinnable(tmp_path) == []
    assert launch.main(replace(config, apply=True)) == 0  # nothing is left to do
