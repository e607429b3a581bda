"""Stages and steps: every sample is in one step or passed over, whatever the batch does."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import DataConfig, SourceConfig, StageConfig, TrainConfig, load_config, to_dict
from pretrain.config import run as run_config
from pretrain.config.data_stages import (
    DataStage,
    Steps,
    micro_batch_of,
    n_steps_of,
    plan_stages,
    tokens_before,
)
from pretrain.errors import ConfigError


def config(*stages: StageConfig) -> DataConfig:
    sources = [SourceConfig(name=name, manifest=f"{name}.json", weight=1.0) for name in ("web", "code")]
    return DataConfig(sources=sources, sequence_length=4, stages=list(stages))


def summary(stages: list[DataStage]) -> list[tuple]:
    return [(s.first_sample, s.start_tokens, s.weights, s.sequence_length, s.batch_sequences) for s in stages]


def test_a_stage_keeps_what_it_does_not_name() -> None:
    data = config(
        StageConfig(start_tokens=100, global_batch_sequences=8),
        StageConfig(start_tokens=201, sequence_length=8),
        StageConfig(start_tokens=400, weights={"code": 1.0}),
    )
    assert summary(plan_stages(data, 3)) == [
        (0, 0, (1.0, 1.0), 4, 3),
        (27, 100, (1.0, 1.0), 4, 8),  # after 9 steps of 12 tokens
        (51, 201, (1.0, 1.0), 8, 8),  # and 3 of 32
        (83, 400, (0.0, 1.0), 8, 8),  # and 4 of 64
    ]


def test_a_configuration_plans_its_stages_once_and_has_no_key_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned: list[DataConfig] = []
    monkeypatch.setattr(
        run_config, "plan_stages", lambda *given: planned.append(given[0]) or plan_stages(*given)
    )
    base = ["run_dir=x", "data.manifest=x", "total_tokens=100000"]
    one = load_config(TrainConfig, base, "config")
    assert one.stages is one.stages
    assert (one.n_steps, one.grad_accum_steps(1)) == (4, 8)
    assert len(planned) == 1
    assert "stages" not in to_dict(one)
    assert replace(one, global_batch_sequences=64).stages[0].batch_sequences == 64
    with pytest.raises(ConfigError, match="stages"):
        load_config(TrainConfig, [*base, "+stages=[]"], "config")


def test_stages_within_one_step_begin_together() -> None:
    data = config(
        StageConfig(start_tokens=10, weights={"web": 1.0}), StageConfig(start_tokens=11, sequence_length=8)
    )
    assert [stage.first_sample for stage in plan_stages(data, 5)] == [0, 5, 5]


def test_what_has_begun_stays_and_the_rest_follows_the_configuration() -> None:
    first = config(StageConfig(start_tokens=100, weights={"code": 1.0}))
    begun = plan_stages(first, 3)[:1]
    later = config(
        StageConfig(start_tokens=150, weights={"code": 1.0}), StageConfig(start_tokens=300, sequence_length=8)
    )
    assert summary(plan_stages(later, 6, begun, fixed_samples=9)) == [
        (0, 0, (1.0, 1.0), 4, 3),
        (9, None, (1.0, 1.0), 4, 6),  # the batch changes where the run goes on
        (39, 150, (0.0, 1.0), 4, 6),
        (75, 300, (0.0, 1.0), 8, 6),
    ]
    assert plan_stages(first, 3, begun, fixed_samples=9) == plan_stages(first, 3)
    with pytest.raises(ConfigError, match=r"start_tokens=20 .*36 tokens"):
        plan_stages(config(StageConfig(start_tokens=20, weights={"code": 1.0})), 3, begun, fixed_samples=9)


def test_a_batch_that_a_stage_sets_is_no_change() -> None:
    data = config(StageConfig(start_tokens=12, global_batch_sequences=6))
    stages = plan_stages(data, 3)
    assert plan_stages(data, 3, stages, fixed_samples=27) == stages


def test_a_source_that_joins_has_no_weight_in_what_has_begun() -> None:
    data = config()
    begun = [replace(plan_stages(data, 3)[0], weights=(1.0,))]
    joined = config(StageConfig(start_tokens=60, weights={"web": 1.0, "code": 2.0}))
    assert [stage.weights for stage in plan_stages(joined, 3, begun, fixed_samples=6)] == [
        (1.0, 0.0),
        (1.0, 2.0),
    ]


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[DataStage], list[list[int]]]:
    """Stages with any batches, and stretches passed over, each of whole steps."""
    stages, first = [], 0
    for length in sorted(draw(st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=4))):
        batch = draw(st.integers(1, 7))
        stages.append(
            DataStage(first_sample=first, weights=(1.0,), sequence_length=length, batch_sequences=batch)
        )
        first += batch * draw(st.integers(0, 6))
    passed_over: list[list[int]] = []
    for _ in range(draw(st.integers(0, 3))):
        steps = Steps(stages, passed_over)
        number, count = draw(st.integers(1, 20)), draw(st.integers(1, 4))
        passed_over.append([steps[number].first_sample, steps.end_after(number, count, stages)])
    return stages, passed_over


@given(run=runs())
def test_every_sample_is_in_one_step_or_passed_over(run: tuple[list[DataStage], list[list[int]]]) -> None:
    stages, passed_over = run
    steps = Steps(stages, passed_over)
    taken: list[int] = []
    samples = tokens = 0
    for number in range(1, 31):
        step = steps[number]
        mine = range(step.first_sample, step.end_sample)
        taken += mine
        stage = [s for s in stages if s.first_sample <= step.first_sample][-1]
        assert (step.number, len(mine), step.sequence_length) == (
            number,
            stage.batch_sequences,
            stage.sequence_length,
        )
        samples += len(mine)
        tokens += len(mine) * step.sequence_length
        assert (step.samples_seen, step.tokens_seen) == (samples, tokens)
        assert [steps.step_of(sample) for sample in mine] == [number] * len(mine)
        assert steps.steps_for(tokens) == number
        assert steps.steps_for(tokens + 1) == number + 1
    left_out = {s for first, end in passed_over for s in range(first, end)}
    assert sorted({*taken, *(s for s in left_out if s < taken[-1])}) == list(range(taken[-1] + 1))
    assert not left_out & set(taken)
    assert all(steps.step_of(sample) is None for sample in left_out)


def test_the_step_before_the_first_is_empty() -> None:
    stages = plan_stages(config(), 3)
    assert Steps(stages)[0] == (0, 0, 0, 0, 4, 0, 0)


def test_the_length_of_a_run() -> None:
    stages = plan_stages(config(StageConfig(start_tokens=24, global_batch_sequences=6)), 3)
    assert n_steps_of(stages, 7, None) == 7
    assert [n_steps_of(stages, None, tokens) for tokens in (1, 12, 13, 24, 25, 48, 49)] == [
        1,
        1,
        2,
        2,
        3,
        3,
        4,
    ]


@given(run=runs(), sample=st.integers(0, 200))
def test_tokens_before_a_sample(run: tuple[list[DataStage], list[list[int]]], sample: int) -> None:
    stages = run[0]
    at = [[s for s in stages if s.first_sample <= i][-1].sequence_length for i in range(sample)]
    assert tokens_before(stages, sample) == sum(at)


@pytest.mark.parametrize(
    ("step", "length", "ranks", "tokens", "sequences"),
    [
        (32, 1024, 2, 4096, 4),
        (32, 2048, 2, 4096, 2),
        (32, 8192, 2, 4096, 1),
        (6, 1024, 2, 4096, 3),
        (10, 1, 2, 4, 1),
    ],
)
def test_a_forward_pass_keeps_its_tokens(
    step: int, length: int, ranks: int, tokens: int, sequences: int
) -> None:
    assert micro_batch_of(step, length, ranks, tokens) == sequences
