"""Saving beside training: one at a time, what is kept, what is said of a failure; in one process."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from pretrain.arithmetic import advised_interval_s, between_failures_s
from pretrain.checkpoint import saver as saving
from pretrain.checkpoint import tensors as checkpoint
from pretrain.checkpoint.saver import Saver
from pretrain.checkpoint.tensors import ALONE
from pretrain.config import CheckpointConfig
from pretrain.distributed import Partition
from support.run_states import run_state

pytestmark = pytest.mark.usefixtures("process_group")


def snapshot() -> dict[str, Partition]:
    return {"weight.a": Partition(torch.arange(15.0), 15)}


def save_all(root: Path, policy: CheckpointConfig, losses: dict[int, float], steps: list[int]) -> list[int]:
    saver = Saver(root, policy, ALONE, losses)
    for step in steps:
        saver.start(step, snapshot, run_state(step, {"a": (3, 5)}))
        saved = saver.finished(wait=True)
        assert saved is not None
        assert saved.problem is None
        assert saved.bytes == sum(f.stat().st_size for f in saved.path.iterdir() if f.name != "COMPLETE")
    return [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(root)]


def test_the_newest_the_permanent_and_the_best_are_kept(tmp_path: Path) -> None:
    policy = CheckpointConfig(keep_last=1, keep_every_steps=40, keep_best=1)
    losses = {10: 3.0, 20: 2.0, 30: 2.5, 50: 2.1}
    assert save_all(tmp_path, policy, losses, [10, 20, 30, 40, 50, 60]) == [20, 40, 60]


def test_training_goes_on_while_a_save_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write is held up (a stand-in for a slow disk); until it ends the save is in flight and nothing is there."""
    gate = threading.Event()
    write = checkpoint.save
    monkeypatch.setattr(saving, "save", lambda *a: gate.wait(30) and write(*a))
    saver = Saver(tmp_path, CheckpointConfig(), ALONE, {})
    saver.start(1, snapshot, run_state(1, {"a": (3, 5)}))
    assert saver.busy
    assert saver.finished() is None
    assert checkpoint.list_checkpoints(tmp_path) == []
    with pytest.raises(AssertionError, match="one save at a time"):
        saver.start(2, snapshot, run_state(1, {"a": (3, 5)}))
    gate.set()
    saved = saver.finished(wait=True)
    assert saved is not None
    assert (saved.step, saved.problem) == (1, None)
    assert not saver.busy
    assert saver.finished() is None
    assert checkpoint.find_latest(tmp_path).path == saved.path


@pytest.mark.parametrize(("writes", "expected"), [(True, True), (False, False)])
def test_the_watchdog_sees_whether_an_awaited_save_gets_on(
    writes: bool, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a slow disk, on which the write goes on bit by bit or not at all."""

    def slow_save(*_: object) -> int:
        for _ in range(12):
            time.sleep(0.25)
            if writes:
                (tmp_path / "file").write_bytes(b"x" * saving.IO_NOISE_BYTES)
        return 1

    touched: list[float] = []
    monkeypatch.setattr(saving, "save", slow_save)
    monkeypatch.setattr(saving, "retain", lambda *_: [])
    monkeypatch.setattr(saving, "touch", lambda: touched.append(time.monotonic()))
    saver = Saver(tmp_path, CheckpointConfig(), ALONE, {})
    saver.start(1, snapshot, run_state(1, {"a": (3, 5)}))
    assert saver.finished(wait=True) is not None
    assert bool(touched) is expected


def test_a_failed_save_says_why_and_the_next_one_works(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    saver = Saver(tmp_path, CheckpointConfig(), ALONE, {})
    saver.start(1, snapshot, run_state(1, {"a": (3, 5)}))
    saved = saver.finished(wait=True)
    assert saved is not None
    assert saved.problem is not None
    assert "Not a directory" in saved.problem or "File exists" in saved.problem
    (tmp_path / "checkpoints").unlink()
    assert save_all(tmp_path, CheckpointConfig(), {}, [2]) == [2]


def test_an_error_that_is_none_of_storage_reaches_the_trainer(tmp_path: Path) -> None:
    saver = Saver(tmp_path, CheckpointConfig(), ALONE, {})
    saver.start(1, snapshot, {"not": object()})
    with pytest.raises(TypeError, match="not JSON serializable"):
        saver.finished(wait=True)


def test_large_ranks_write_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 80)
    partitions = {f"weight.{name}": Partition(torch.full((15,), i), 15) for i, name in enumerate("abc")}
    checkpoint.save(tmp_path, 1, partitions, run_state(1, dict.fromkeys("abc", (15,))), ALONE)
    path = checkpoint.checkpoint_path(tmp_path, 1)
    assert len(list(path.glob("*.safetensors"))) == 3
    found = checkpoint.find_latest(tmp_path).verified
    loaded = checkpoint.load(found, [f"weight.{name}" for name in "abc"], dict.fromkeys("abc", (15,)), ALONE)
    assert {key: values.tolist() for key, values in loaded.items()} == {
        f"weight.{name}": [float(i)] * 15 for i, name in enumerate("abc")
    }


def test_advised_interval() -> None:
    assert advised_interval_s(2.0, between_failures_s(8, 10.0)) == pytest.approx((2 * 2 * 36000) ** 0.5)
    # 16,384 ranks: 50,000 h / 16,384 = 3.05 h, which is what Llama 3 saw
    assert advised_interval_s(1.0, between_failures_s(16384, None)) == pytest.approx(
        (2 * 50000 / 16384 * 3600) ** 0.5
    )
