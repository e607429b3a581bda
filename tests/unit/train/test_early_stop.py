"""Early stopping: what counts as a gain, when a run ends, and that its counters survive a restart."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import EvaluationConfig
from pretrain.errors import ConfigError
from pretrain.train.early_stop import EarlyStop


def config(**values: object) -> EvaluationConfig:
    return EvaluationConfig(**{"manifest": "held/manifest.json", "patience": 2, **values})


def first_stop(losses: list[float], settings: EvaluationConfig) -> int | None:
    """The number of the evaluation, counted from 1, after which the run ends."""
    stop = EarlyStop(settings)
    for number, loss in enumerate(losses, 1):
        stop.note(10 * number, loss)
        if stop.reason is not None:
            return number
    return None


@pytest.mark.parametrize(
    ("losses", "values", "expected"),
    [
        ([5, 4, 3, 2], {}, None),
        ([5, 5, 5], {}, 3),
        ([5, 6, 4, 5, 5], {}, 5),  # a gain starts the count anew
        ([5, 5, 5], {"patience": None}, None),
        ([5, 5], {"patience": 1}, 2),
        ([5.0, 4.9, 4.8], {"min_gain": 0.15}, None),  # the two falls together are a gain
        ([5.0, 4.9, 4.87], {"min_gain": 0.15}, 3),
        ([5.0, 4.5, 4.0], {"min_gain": 0.5}, None),  # exactly the gain counts
        ([math.nan, math.inf], {}, 2),
        ([math.nan, 5, math.nan, math.nan], {}, 4),
    ],
)
def test_a_run_ends_after_evaluations_without_a_gain(
    losses: list[float], values: dict[str, object], expected: int | None
) -> None:
    assert first_stop(losses, config(**values)) == expected


@given(
    st.lists(st.sampled_from([1.0, 1.5, 2.0, 2.25, 3.0, math.nan]), max_size=12),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.lists(st.integers(0, 11), max_size=4),
)
def test_restarts_and_repeated_evaluations_change_nothing(
    losses: list[float], patience: int, min_gain: float, restarts: list[int]
) -> None:
    settings = config(patience=patience, min_gain=min_gain)
    straight, restarted = EarlyStop(settings), EarlyStop(settings)
    for number, loss in enumerate(losses):
        straight.note(number + 1, loss)
        restarted.note(number + 1, loss)
        if number in restarts:
            restarted = EarlyStop(settings, json.loads(json.dumps(restarted.state())))
            restarted.note(number + 1, loss - 1)  # of a step that is counted already
        assert (restarted.state(), restarted.reason) == (straight.state(), straight.reason)


def test_the_reason_names_set_step_and_loss() -> None:
    stop = EarlyStop(EvaluationConfig(sets={"law": "l", "code": "c"}, by="code", patience=1, min_gain=0.25))
    stop.note(10, 2.5)
    stop.note(20, 2.4)
    assert stop.reason is not None
    for part in ("heldout/code/loss", "step 10", "2.5000", "0.25"):
        assert part in stop.reason


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"patience": 0}, r"evaluation\.patience=0"),
        ({"patience": 1}, r"evaluation\.patience=1 .*evaluation\.manifest"),
        ({"manifest": "m", "min_gain": -1}, r"evaluation\.min_gain=-1"),
        ({"manifest": "m", "min_gain": math.nan}, r"evaluation\.min_gain=nan"),
        ({"manifest": "m", "by": "law"}, r"evaluation\.by=law .*heldout"),
        ({"sets": {"source": "m"}}, r"evaluation\.sets: 'source'"),
        ({"sets": {"a/b": "m"}}, r"evaluation\.sets: 'a/b'"),
    ],
)
def test_settings_that_fit_nothing_are_refused(values: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        EvaluationConfig(**values)


def test_the_plain_set_decides_unless_another_is_named() -> None:
    sets = {"law": "l", "code": "c"}
    assert EvaluationConfig(manifest="m", sets=sets).deciding_metric == "loss"
    assert EvaluationConfig(sets=sets).deciding_metric == "law/loss"
    assert EvaluationConfig(manifest="m", sets=sets, by="code").deciding_metric == "code/loss"
    assert list(EvaluationConfig(manifest="m", sets=sets).corpora) == ["heldout", "law", "code"]
