"""The moving average of the weights under every ZeRO stage: its values, its evaluation, its way through checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.checkpoint import tensors as checkpoint
from pretrain.model.decoder import Decoder
from support.checkpoints import assert_same_state, read_tensors
from support.launching import run_ranks
from support.workers.engine_worker import GLOBAL, batch_of, losses, small_config

pytestmark = pytest.mark.integration

STEPS, DECAY = 4, 0.3
WORKER = "tests/support/workers/engine_worker.py"
CASES = [(2, "bf16"), (3, "fp32")]
MORE_CASES = [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")]


def job(root: Path, kind: str, stage: int, precision: str, **more: object) -> dict:
    name = f"{kind}-{stage}-{precision}"
    where = {"save": str(root / name), "out": str(root / f"{name}.json")}
    return {"stage": stage, "precision": precision, "steps": STEPS, "ema": DECAY, **where, **more}


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `trained` trains of CASES, with updates at every second step, and from a checkpoint without an average."""
    root = tmp_path_factory.mktemp("ema")
    seldom = job(root, "seldom", 2, "fp32", overrides=["ema.every_steps=2"])
    plain = str(checkpoint.checkpoint_path(root / "plain-3-fp32", STEPS))
    train(root, CASES, seldom, job(root, "begun", 3, "fp32", steps=0, load=plain))
    return root


def train(root: Path, cases: list[tuple[int, str]], *more: dict) -> None:
    """Every case on 2 ranks: 4 steps straight, 2 and then 2 more after a restart, and once without an average."""
    jobs = []
    for case in cases:
        half = str(checkpoint.checkpoint_path(root / f"half-{case[0]}-{case[1]}", 2))
        jobs += [job(root, "straight", *case), job(root, "half", *case, steps=2)]
        jobs.append(job(root, "resumed", *case, steps=2, load=half, before_load=1))
        jobs.append(job(root, "plain", *case))
        del jobs[-1]["ema"]
    run_ranks(2, WORKER, json.dumps([*jobs, *more]), log_dir=root / "logs")


def check(root: Path, stage: int, precision: str) -> None:
    """It is the average, training does not notice it, and a restart changes no bit of it."""
    kinds = ("straight", "resumed")
    one, other = (checkpoint.checkpoint_path(root / f"{kind}-{stage}-{precision}", STEPS) for kind in kinds)
    found = json.loads((root / f"straight-{stage}-{precision}.json").read_text())
    assert found["ema_difference"] < 1e-6
    assert found["changed"] == []  # no bit of weights, moments and average differs after an evaluation
    assert found["losses"] == losses(root, f"plain-{stage}-{precision}")
    tensors = read_tensors(one)
    assert sum(key.startswith("ema.") for key in tensors) == sum(key.startswith("weight.") for key in tensors)
    assert_same_state(one, other)
    check_evaluated(tensors, found["ema_loss"], precision)


def check_evaluated(tensors: dict[str, torch.Tensor], found: float, precision: str) -> None:
    """The loss is that of a plain model with the averaged weights of the checkpoint, not that of the trained ones."""
    config = small_config(0, "fp32", [])
    batch = batch_of(np.arange(GLOBAL))
    expected = {}
    for kind in ("ema", "weight"):
        model = Decoder(config.model, config.seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(tensors[f"{kind}.{name}"].view(parameter.shape))
            expected[kind] = float(model(*batch[:4]).nll_sum)
    assert found == pytest.approx(expected["ema"], rel=1e-5 if precision == "fp32" else 5e-3)
    assert abs(found - expected["ema"]) < 0.1 * abs(found - expected["weight"])


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_the_average_of_each_stage(averaged: Path, stage: int, precision: str) -> None:
    check(averaged, stage, precision)


@pytest.mark.long
def test_the_average_of_more_stages_and_precisions(tmp_path: Path) -> None:
    train(tmp_path, MORE_CASES)
    for stage, precision in MORE_CASES:
        check(tmp_path, stage, precision)


def test_an_average_that_begins_later_begins_as_the_weights(averaged: Path) -> None:
    tensors = read_tensors(checkpoint.checkpoint_path(averaged / "begun-3-fp32", STEPS))
    names = [key.removeprefix("ema.") for key in tensors if key.startswith("ema.")]
    assert names
    assert all(torch.equal(tensors[f"ema.{name}"], tensors[f"weight.{name}"]) for name in names)


def test_fewer_updates_count_for_more_steps(averaged: Path) -> None:
    found = json.loads((averaged / "seldom-2-fp32.json").read_text())
    assert found["ema_difference"] < 1e-6
    assert found["changed"] == []


@pytest.mark.long
def test_it_travels_over_ranks_and_stages(averaged: Path, tmp_path: Path) -> None:
    """2 ranks of ZeRO-3 -> 1 rank of each stage: the same tensors."""
    origin = checkpoint.checkpoint_path(averaged / "half-3-fp32", 2)
    stages = (0, 1, 3)
    jobs = [job(tmp_path, "hop", stage, "fp32", steps=0, load=str(origin)) for stage in stages]
    run_ranks(1, WORKER, json.dumps(jobs), log_dir=tmp_path / "logs")
    for stage in stages:
        assert_same_state(origin, checkpoint.checkpoint_path(tmp_path / f"hop-{stage}-fp32", 2))
