"""What a checkpoint holds of the data, and what may change when a run goes on."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pretrain.config.data_stages import DataStage
from pretrain.data.state import OrderState, Substitution
from pretrain.errors import ConfigError


def stage(first: int, start: int | None, *weights: float, length: int = 512, **values: object) -> DataStage:
    return DataStage(
        first_sample=first,
        start_tokens=start,
        weights=weights,
        sequence_length=length,
        batch_sequences=8,
        **values,
    )


STATE = OrderState(
    manifest_sha=["a" * 64, "b" * 64],
    seed=1,
    stages=[stage(0, 0, 0.5, 0.5), stage(800, 409_600, 0.9, 0.1), stage(1600, 819_200, 0.1, 0.9)],
    consumed_samples=1000,
    lanes=8,
    chunk_tokens=[4096, 4096],
    window_chunks=32,
    packing="concat",
    passed_over=[[400, 480]],
    substitutions=[
        Substitution(source=1, epoch=0, chunk=3, first_sample=17, substitute=9, reason="it was cut off")
    ],
)


def test_state_survives_json_and_is_small() -> None:
    text = json.dumps(STATE.to_dict())
    assert OrderState.from_dict(json.loads(text)) == STATE
    assert len(text) < 1000


def test_state_of_another_version_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"schema 99.*reads schema 2"):
        OrderState.from_dict(STATE.to_dict() | {"schema": 99})
    values = STATE.to_dict()
    del values["lanes"]
    with pytest.raises(ConfigError, match="lanes is missing"):
        OrderState.from_dict(values)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": 2}, "seed=2 was 1"),
        ({"lanes": 16}, "data.lanes=16 was 8"),
        ({"window_chunks": 4}, "data.window_chunks=4 was 32"),
        ({"packing": "best_fit"}, "data.packing=best_fit was concat"),
        (
            {"manifest_sha": ["a" * 64, "c" * 64]},
            f"source 1 .*{'c' * 64}, was {'b' * 64}",
        ),
        ({"manifest_sha": ["a" * 64]}, "1 sources, was 2"),
        ({"chunk_tokens": [4096, 8192]}, "source 1 .*8192 tokens, was 4096"),
        (
            {"stages": STATE.stages[:1]},
            "409600 tokens .*was sequences of 512",
        ),
        (
            {"stages": [stage(0, 0, 0.25, 0.75), *STATE.stages[1:]]},
            r"began after 0 tokens is .*shares \[0.25, 0.75\], was .*shares \[0.5, 0.5\]",
        ),
        (
            {"stages": [stage(0, 0, 0.5, 0.5, length=1024), *STATE.stages[1:]]},
            "is sequences of 1024 tokens .* was sequences of 512 tokens",
        ),
    ],
)
def test_another_order_is_refused_by_name(change: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as refusal:
        STATE.check_compatible(replace(STATE, **change))
    assert str(refusal.value).count(" was ") == 1, "only what differs is named"


def test_every_difference_is_named() -> None:
    with pytest.raises(ConfigError, match=r"seed=2 was 1; data\.lanes=16 was 8"):
        STATE.check_compatible(replace(STATE, seed=2, lanes=16))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"consumed_samples": 0},
        {"stages": STATE.stages[:2]},  # a stage to come is dropped
        {"stages": [*STATE.stages[:2], stage(1200, 700_000, 0.2, 0.8, length=1024)]},  # or others come
        {
            "stages": [stage(0, 0, 1.0, 1.0), stage(800, 409_600, 9.0, 1.0)]
        },  # the same mixture in other numbers
        {  # a new source joins
            "manifest_sha": [*STATE.manifest_sha, "c" * 64],
            "chunk_tokens": [4096] * 3,
            "stages": [stage(0, 0, 0.5, 0.5, 0.0), stage(800, 409_600, 0.9, 0.1, 0.0)],
        },
    ],
)
def test_what_is_still_unread_may_change(change: dict) -> None:
    STATE.check_compatible(replace(STATE, **change))
    assert [s.first_sample for s in replace(STATE, **change).stages[:2]] == [0, 800]


def test_what_will_be_passed_over_is_fixed_too() -> None:
    """A rollback decides the samples up to the end of what it passes over."""
    ahead = replace(STATE, passed_over=[[1000, 1700]])
    assert (STATE.fixed_samples, ahead.fixed_samples) == (1000, 1700)
    assert (len(STATE.begun), len(ahead.begun)) == (2, 3)
    with pytest.raises(ConfigError, match="began after 819200 tokens is gone"):
        ahead.check_compatible(replace(STATE, stages=STATE.stages[:2]))


def test_stages_that_nobody_configured_are_not_asked_for() -> None:
    """The batch changed at a restart, and a source had ended."""
    own = [*STATE.stages[:2], stage(900, None, 0.9, 0.1, ended=(1,))]
    replace(STATE, stages=own).check_compatible(STATE)
    assert own[-1].drawn_weights == [0.9, 0.0]
