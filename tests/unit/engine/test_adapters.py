"""Adapters under each ZeRO stage and precision on one rank, against plain PyTorch; and each silent fault, planted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint import tensors as checkpoint
from pretrain.distributed import World
from pretrain.engine import adapters as engine_adapters
from pretrain.engine.engine import Engine
from pretrain.engine.optim import parameter_groups
from pretrain.errors import ConfigError, RunError
from pretrain.model.decoder import Decoder
from pretrain.model.lora import add_adapters, plain_name
from pretrain.train.adapters import check_adapters
from support.run_states import run_state
from support.workers.engine_worker import GLOBAL, LR, batch_of, batches_of_step, small_config

ALONE = World(0, 1, 0, torch.device("cpu"))
STEPS = 4
ADAPTED = ["init_from=base", "lora.r=4", f"optim.lr={LR}"]
DROPOUT = ["lora.dropout=0.2", "model.dropout=0.1"]
# The tolerances of test_engine.py, for the same reasons.
TOLERANCE = {"fp32": 5e-6, "bf16": 4e-3, "fp16": 5e-4}
CASES = [(0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16"), (3, "fp16")]
VARIANTS = {
    "plain": [],
    "dora": ["lora.dora=true"],
    "rank_stabilized": ["lora.rank_stabilized=true", "lora.targets=[q,down]"],
}
OTHERS = {
    "muon": ["optim=muon", "lora.dora=true"],
    "offload": ["engine.offload_optimizer=true", "engine.offload_params=true"],
    "selective": ["model.activation_checkpointing=selective"],
    "full": ["model.activation_checkpointing=full"],
    "compiled": ["kernels=compiled"],
}


@pytest.fixture(scope="module", autouse=True)
def one_rank(process_group: None) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}.items():
        patch.setenv(name, value)
    yield
    patch.undo()


def base_model(config: Any) -> Decoder:
    model = Decoder(config.model, seed=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):  # of queries, keys and values, as Qwen2 has them; they begin as 0
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()))
    return model


def base_of(config: Any) -> dict[str, torch.Tensor]:
    named = base_model(config).named_parameters()
    return {f"weight.{name}": p.detach().flatten().clone() for name, p in named}


def engine_of(stage: int, precision: str, *overrides: str) -> Engine:
    config = small_config(stage, precision, [*ADAPTED, *overrides])
    return Engine(config, ALONE, base_of(config))


def train(engine: Engine, first: int = 1, last: int = STEPS, lr: float = LR) -> list[float]:
    losses = []
    for step in range(first, last + 1):
        batches = batches_of_step(step, ALONE)
        result = engine.train_step(batches, step, lr=lr)
        assert result is not None
        assert not result.memory_changed
        losses.append(float(result.nll_sum) / result.n_predicted)
        engine.evaluate(batches[0])  # must not change the training
    return losses


def state_of(engine: Engine) -> dict[str, torch.Tensor]:
    return {key: partition.values.clone() for key, partition in engine.state.snapshot().items()}


def plain_losses(*overrides: str) -> list[float]:
    """The same in bare PyTorch with peft: one process, fp32, the whole batch at once."""
    config = small_config(0, "fp32", [*ADAPTED, *overrides])
    model = base_model(config)
    add_adapters(model, config.lora, config.seed)
    named = [(plain_name(name), p) for name, p in model.named_parameters() if p.requires_grad]
    optim, losses = config.optim, []
    optimizer = torch.optim.AdamW(
        parameter_groups(named, optim), lr=LR, betas=(optim.beta1, optim.beta2), eps=optim.eps
    )
    for step in range(1, STEPS + 1):
        batch = batch_of(torch.arange((step - 1) * GLOBAL, step * GLOBAL).numpy())
        sums = model(batch.tokens, batch.labels, batch.positions, batch.document_ids)
        loss = sums.nll_sum / sums.n_predicted
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], optim.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("stage", "precision"), CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_equal_a_plain_loop_with_peft(stage: int, precision: str, variant: str) -> None:
    engine = engine_of(stage, precision, *VARIANTS[variant])
    found = train(engine)
    assert found == pytest.approx(plain_losses(*VARIANTS[variant]), abs=TOLERANCE[precision])
    assert found[-1] < found[0] - 0.01
    assert all(".lora_" in name for name in engine.state.shapes)
    assert sum(name.endswith(".bias") for name in engine.state._frozen) == 6
    assert engine.state.n_frozen == sum(values.numel() for values in base_of(engine.config).values())


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_resume_is_bit_identical_with_dropout(stage: int, precision: str) -> None:
    """Dropout is a function of (seed, step, rank), so nothing of it is saved."""
    engine = engine_of(stage, precision, *DROPOUT)
    losses = train(engine, 1, 2)
    half, applied = state_of(engine), engine.state.optimizer_step
    losses += train(engine, 3, 4)
    resumed = engine_of(stage, precision, *DROPOUT)
    train(resumed, 90, 90)  # as before a rollback
    resumed.state.restore(half, applied)
    assert train(resumed, 3, 4) == losses[2:]
    straight, again = state_of(engine), state_of(resumed)
    assert straight.keys() == again.keys()
    assert [key for key in straight if not torch.equal(straight[key], again[key])] == []
    assert losses != train(engine_of(stage, precision))  # dropout is at work


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long) if n == "compiled" else n for n in OTHERS]
)
def test_other_options_train_adapters_too(name: str) -> None:
    engine = engine_of(3, "fp32", *OTHERS[name])
    found = train(engine)
    assert found[-1] < found[0] - 0.01
    if name != "muon":
        assert found == pytest.approx(plain_losses(), abs=TOLERANCE["fp32"])


def test_what_recomputes_draws_the_same_dropout() -> None:
    assert train(engine_of(3, "fp32", *DROPOUT, *OTHERS["full"])) == train(engine_of(3, "fp32", *DROPOUT))


def test_lengths_of_rows_are_not_decayed() -> None:
    model = Decoder(small_config(0, "fp32", []).model, seed=5)
    config = small_config(0, "fp32", [*ADAPTED, "lora.dora=true"])
    add_adapters(model, config.lora, seed=1)
    named = [(plain_name(name), p) for name, p in model.named_parameters() if p.requires_grad]
    decayed, plain = parameter_groups(named, config.optim)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (config.optim.weight_decay, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in plain["params"]} == {1}
    assert len(plain["params"]) == 14


# --- planted faults ---


def saved(engine: Engine, root: Path, change: Any = lambda partitions: None, drop: str = "") -> None:
    """The checkpoint of step 4, with a fault planted in what is written."""
    partitions = {
        key: replace(part, values=part.values.clone())
        for key, part in engine.state.snapshot().items()
        if not drop or drop not in key
    }
    change(partitions)
    shapes = {name: shape for name, shape in engine.state.shapes.items() if not drop or drop not in name}
    checkpoint.save(root, STEPS, partitions, run_state(STEPS, shapes), ALONE)


def checked(engine: Engine, root: Path) -> dict[str, Any]:
    return check_adapters(engine.config, engine.state, root, STEPS, ALONE)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_frozen_weight_that_changes_is_noticed(stage: int) -> None:
    engine = engine_of(stage, "fp32")
    train(engine, 1, 1)
    engine.state.snapshot()
    frozen: Any = engine.state._frozen["blocks.1.attention.q.weight"]
    (frozen.ds_tensor if stage == 3 else frozen).data[0] += 1e-3
    with pytest.raises(RunError, match="frozen weights changed"):
        engine.state.snapshot()
    result = engine.train_step(batches_of_step(2, ALONE), 2, lr=LR)
    assert result is not None
    assert result.memory_changed  # and in the same step, as any flipped bit


@pytest.mark.parametrize("stage", [1, 3])
def test_a_base_that_is_not_loaded_is_noticed(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = engine_adapters.gathered
    monkeypatch.setattr(engine_adapters, "gathered", lambda *args: real(*args) * 1.5)
    with pytest.raises(RunError, match="are not those of the base"):
        engine_of(stage, "bf16")


def test_adapters_that_learn_nothing_are_noticed(tmp_path: Path) -> None:
    engine = engine_of(3, "fp32")
    train(engine, lr=0.0)
    saved(engine, tmp_path)
    with pytest.raises(ConfigError, match="14 of 14 adapters are still 0"):
        checked(engine, tmp_path)


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "bf16"), (3, "bf16")])
def test_what_is_saved_is_what_was_trained(tmp_path: Path, stage: int, precision: str) -> None:
    engine = engine_of(stage, precision)
    train(engine)
    saved(engine, tmp_path / "good")
    facts = checked(engine, tmp_path / "good")
    weights = [v for key, v in state_of(engine).items() if key.startswith("weight.") and "lora_B" in key]
    norm = float(torch.cat(weights).norm())
    assert facts == {
        "adapters": 14,
        "trained_parameters": engine.state.n_trained,
        "norm": pytest.approx(norm, rel=1e-5),
    }
    json.dumps(facts)

    def zeroed(partitions: dict[str, Any]) -> None:
        partitions["weight.blocks.0.attention.k.lora_A.weight"].values.zero_()

    saved(engine, tmp_path / "zeroed", zeroed)  # as an empty tensor of ZeRO-3 would be
    with pytest.raises(RunError, match=r"does not hold what was trained: blocks\.0\.attention\.k\.lora_A"):
        checked(engine, tmp_path / "zeroed")
    saved(engine, tmp_path / "fewer", drop="feed_forward.up")
    with pytest.raises(RunError, match="holds 12 adapters, but 14 were trained"):
        checked(engine, tmp_path / "fewer")
    with pytest.raises(RunError, match="in no checkpoint"):
        checked(engine, tmp_path / "none")
    # What forward passes used is not what is saved.
    parameter: Any = engine._parameters["blocks.0.attention.v.lora_B.weight"]
    (parameter.ds_tensor if stage == 3 else parameter).data[0] += 1
    with pytest.raises(RunError, match=r"does not hold what was trained: blocks\.0\.attention\.v\.lora_B"):
        checked(engine, tmp_path / "good")
