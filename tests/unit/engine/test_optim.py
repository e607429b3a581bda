"""Learning rate as a function of the step, and which parameters decay."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import ModelConfig, OptimConfig, OptimizerName, ScheduleConfig, ScheduleName
from pretrain.engine.optim import build_optimizer, learning_rate, moments_of, parameter_groups
from pretrain.model.decoder import Decoder

PEAK = 2.0
schedules = st.builds(
    ScheduleConfig,
    name=st.sampled_from(ScheduleName),
    warmup_steps=st.integers(0, 50),
    decay_steps=st.none() | st.integers(1, 100),
    min_lr_frac=st.floats(0, 1),
)


@given(schedules, st.integers(51, 300))
def test_stays_within_bounds_and_falls_after_the_warmup(schedule: ScheduleConfig, n_steps: int) -> None:
    rates = [learning_rate(schedule, PEAK, step, n_steps) for step in range(1, n_steps + 1)]
    warmup = schedule.warmup_steps
    assert all(0 < rate <= PEAK + 1e-12 or schedule.min_lr_frac < 1e-9 for rate in rates)
    assert rates[:warmup] == [PEAK * step / warmup for step in range(1, warmup + 1)]
    after = rates[warmup:]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after))


@given(st.floats(0, 0.99), st.integers(51, 300))
def test_a_warmup_may_be_a_fraction_of_the_run(frac: float, n_steps: int) -> None:
    by_frac = ScheduleConfig(warmup_frac=frac)
    by_steps = ScheduleConfig(warmup_steps=math.ceil(frac * n_steps))
    for step in (1, n_steps // 3, n_steps):
        assert learning_rate(by_frac, PEAK, step, n_steps) == learning_rate(by_steps, PEAK, step, n_steps)


@given(schedules, st.integers(51, 300))
def test_ends_at_the_floor(schedule: ScheduleConfig, n_steps: int) -> None:
    last = learning_rate(schedule, PEAK, n_steps, n_steps)
    if schedule.name is ScheduleName.constant:
        assert last == PEAK
    elif schedule.decay_steps is None or schedule.decay_steps <= n_steps - schedule.warmup_steps:
        assert last == pytest.approx(PEAK * schedule.min_lr_frac, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "step", "expected"),
    [
        (ScheduleName.cosine, 55, 0.2 + 1.8 * 0.5),  # half of the decay of 90 steps: half of the cosine
        (ScheduleName.cosine, 10 + 30, 0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi / 3))),
        (ScheduleName.linear, 55, 1.1),
        (ScheduleName.wsd, 90, 2.0),  # stable up to the last tenth
        (ScheduleName.wsd, 95, 1.1),
        (ScheduleName.constant, 95, 2.0),
    ],
)
def test_known_values(name: ScheduleName, step: int, expected: float) -> None:
    schedule = ScheduleConfig(name=name, warmup_steps=10, min_lr_frac=0.1)
    assert learning_rate(schedule, PEAK, step, 100) == pytest.approx(expected)


def small_model(*, tied: bool) -> Decoder:
    config = ModelConfig(
        n_layers=1, d_model=16, n_heads=2, d_ff=24, vocab_size=32, qk_norm=True, tie_embeddings=tied
    )
    return Decoder(config, seed=0)


@pytest.mark.parametrize("name", OptimizerName)
def test_biases_are_not_decayed(name: OptimizerName) -> None:
    model = Decoder(
        ModelConfig(n_layers=1, d_model=16, n_heads=2, d_ff=24, vocab_size=32, attention_bias=True), seed=0
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model.named_parameters(), OptimConfig(name=name, decay_norms=True))
    of = {names[id(p)]: (g["weight_decay"], g["muon"]) for g in groups for p in g["params"]}
    biases = {name: group for name, group in of.items() if name.endswith("bias")}
    assert len(biases) == 3 and set(biases.values()) == {(0.0, False)}
    assert moments_of("blocks.0.attention.q.bias", OptimConfig(name=name)) == ("exp_avg", "exp_avg_sq")


def test_the_schedule_begins_after_the_moments_are_filled() -> None:
    schedule = ScheduleConfig(warmup_steps=3, moment_warmup_steps=4)
    later = [learning_rate(schedule, PEAK, step, 24) for step in range(1, 25)]
    alone = ScheduleConfig(warmup_steps=3)
    assert later == [0.0] * 4 + [learning_rate(alone, PEAK, step, 20) for step in range(1, 21)]
    assert later[4] == PEAK / 3


@pytest.mark.parametrize("name", OptimizerName)
def test_at_learning_rate_0_moments_change_and_weights_do_not(name: OptimizerName) -> None:
    """What fills the moments of an imported model. tests/integration/test_continue.py shows it in a run."""
    model = Decoder(
        ModelConfig(n_layers=1, d_model=16, n_heads=2, d_ff=24, vocab_size=32, attention_bias=True), seed=0
    )
    config = OptimConfig(name=name, weight_decay=0.5)
    optimizer = build_optimizer(parameter_groups(model.named_parameters(), config), config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.param_groups = [group for group in optimizer.param_groups if not group["muon"]]
    optimizer.step()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert trained and all(optimizer.state[p]["exp_avg"].abs().min() > 0 for p in trained)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("decay_norms", [False, True])
@pytest.mark.parametrize("decay_embeddings", [False, True])
def test_decay_groups(tied: bool, decay_norms: bool, decay_embeddings: bool) -> None:
    model = small_model(tied=tied)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    config = OptimConfig(decay_norms=decay_norms, decay_embeddings=decay_embeddings, weight_decay=0.3)
    groups = parameter_groups(model.named_parameters(), config)
    decayed = {names[id(p)] for g in groups if g["weight_decay"] == 0.3 for p in g["params"]}
    plain = {names[id(p)] for g in groups if g["weight_decay"] == 0.0 for p in g["params"]}
    assert decayed | plain == set(names.values())
    assert not decayed & plain
    norms = {name for name in names.values() if "norm" in name}
    assert len(norms) == 5  # two per block, q and k, the final one
    assert (norms <= decayed) == decay_norms
    assert (norms <= plain) != decay_norms
    assert ("embed.weight" in decayed) == decay_embeddings
    assert ("head.weight" in decayed) != tied
    assert all(
        ("attention" in n or "feed_forward" in n or n == "head.weight")
        for n in decayed - norms - {"embed.weight"}
    )


def test_decay_shrinks_only_its_group() -> None:
    model = small_model(tied=False)
    config = OptimConfig(lr=0.1, weight_decay=0.5)
    optimizer = build_optimizer(parameter_groups(model.named_parameters(), config), config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1.0 if "norm" in name or name == "embed.weight" else 1 - 0.1 * 0.5
        assert torch.allclose(parameter, before[name] * factor), name
