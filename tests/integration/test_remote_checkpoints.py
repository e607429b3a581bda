"""Checkpoints on an object store: a real S3 server on loopback, real runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import folder as checkpoint_folder
from pretrain.checkpoint import tensors as checkpoint
from pretrain.errors import ConfigError
from support.launching import Ranks
from support.tiny import TinyCorpus, events, run_arguments
from support.training import losses, samples_by_step

pytestmark = pytest.mark.integration


def train(corpus: TinyCorpus, run_dir: Path, logs: Path, *more: str, ranks: int = 2) -> list[int]:
    arguments = run_arguments(corpus, run_dir, *more)
    with Ranks(ranks, "launch/train.py", *arguments, log_dir=logs) as processes:
        codes = processes.wait()
    assert set(codes) <= {0, 75}, processes.output()
    return codes


def test_a_run_saves_to_and_resumes_from_s3(corpus: TinyCorpus, s3: str, tmp_path: Path) -> None:
    """Stopped, a damaged newest checkpoint, resumed, read by one process: as on a disk."""
    local, run_dir = tmp_path / "local", tmp_path / "run"
    url = f"{s3}/first"
    target = f"checkpoint.target={url}"
    train(corpus, local, tmp_path / "logs-local")
    assert train(corpus, run_dir, tmp_path / "logs-1", target, "stop_at_step=8") == [75, 75]
    root = checkpoint.root_of_run(run_dir, url)
    assert [p.name for p in checkpoint.list_checkpoints(root)] == ["step-00000004", "step-00000008"]
    shard = sorted(checkpoint.checkpoint_path(root, 8).glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    root.fs.invalidate_cache()  # type: ignore[attr-defined]

    assert train(corpus, run_dir, tmp_path / "logs-2", target) == [0, 0]
    told = [e for e in events(run_dir) if e["event"] in ("checkpoint_passed_over", "resumed")]
    assert "differs from what was written" in told[0]["reason"]
    assert told[1]["step"] == 4
    assert losses(run_dir) == losses(local)
    assert samples_by_step(run_dir) == samples_by_step(local)
    assert not (run_dir / "checkpoints").exists()

    with pytest.raises(ConfigError, match="checkpoint_target=URL"):
        checkpoint.load_weights(run_dir)  # a URL that only the run names
    _, ours, _ = checkpoint.load_weights(run_dir, target=url)
    _, theirs, _ = checkpoint.load_weights(local)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_is_half_there_is_no_checkpoint(corpus: TinyCorpus, s3: str, tmp_path: Path) -> None:
    """A store has no rename: a save that was cut short has no COMPLETE, is passed over, and is written anew."""
    run_dir, target = tmp_path / "run", f"checkpoint.target={s3}/second"
    train(corpus, run_dir, tmp_path / "logs-1", target, "stop_at_step=8", ranks=1)
    root = checkpoint.root_of_run(run_dir, f"{s3}/second")
    (checkpoint.checkpoint_path(root, 8) / "COMPLETE").unlink()
    root.fs.invalidate_cache()  # type: ignore[attr-defined]
    train(corpus, run_dir, tmp_path / "logs-2", target, ranks=1)
    root.fs.invalidate_cache()  # type: ignore[attr-defined]
    assert [checkpoint.verify(path) for path in checkpoint.list_checkpoints(root)] == [None] * 3
    assert [e["step"] for e in events(run_dir) if e["event"] == "resumed"] == [4]


def test_an_unknown_kind_of_store_is_named() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.target=nowhere://x/y cannot be used"):
        _ = checkpoint_folder.root_of("unused", "nowhere://x/y")
