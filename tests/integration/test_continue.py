"""Training that goes on from a model without moments: first they are filled, then the schedule begins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pretrain.checkpoint.tensors import load_weights
from pretrain.reliability.journal import read_metrics
from support.launching import run_ranks
from support.tiny import TinyCorpus, events, run_arguments
from support.training import TRAIN, losses

pytestmark = pytest.mark.integration
FILLED = 4


def moments(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted((run_dir / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {f"{path.name} {k}": file.get_tensor(k) for k in file.keys() if k.startswith("exp_avg")}  # noqa: SIM118
    return found


@pytest.mark.long
def test_moments_are_filled_before_a_weight_changes(
    corpus: TinyCorpus, straight: Path, tmp_path: Path
) -> None:
    """The quick form of this is in tests/unit/engine/test_optim.py."""
    more = [
        f"init_from={straight}",
        "experiment=continue",
        f"schedule.moment_warmup_steps={FILLED}",
        "schedule.warmup_frac=null",
        "total_steps=8",
        "checkpoint.every_steps=2",
        "checkpoint.keep_every_steps=2",
    ]
    whole, halted = tmp_path / "whole", tmp_path / "halted"
    run_ranks(2, TRAIN, *run_arguments(corpus, whole, *more), log_dir=tmp_path / "1")
    arguments = run_arguments(corpus, halted, *more)
    run_ranks(2, TRAIN, *arguments, "stop_at_step=2", log_dir=tmp_path / "2", expect=75)
    run_ranks(2, TRAIN, *arguments, log_dir=tmp_path / "3")
    _, before, _ = load_weights(straight)
    for step in (2, FILLED, 6):
        _, weights, _ = load_weights(halted, step)
        assert all(torch.equal(before[name], weights[name]) for name in before) == (step <= FILLED)
    early, late = moments(halted, 2), moments(halted, FILLED)
    assert early and all(values.abs().max() > 0 for values in early.values())
    assert any(not torch.equal(early[name], late[name]) for name in early)
    rates = [record["lr"] for record in read_metrics(halted)]
    assert rates[:FILLED] == [0.0] * FILLED and rates[FILLED : FILLED + 2] == [1.5e-3, 3e-3]
    assert [e["step"] for e in events(halted) if e["event"] == "moments_filled"] == [FILLED]
    assert losses(halted) == losses(whole)
