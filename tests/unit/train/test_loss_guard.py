"""The loss guard: which losses it knows, and what it decides."""

from __future__ import annotations

import json
import math

from pretrain.config import LossGuardConfig, SpikeAction
from pretrain.train.loss_guard import GuardDecision, LossGuard


def guard(**values: object) -> LossGuard:
    return LossGuard(LossGuardConfig(**{"spike_sigmas": 6.0, "window_steps": 4, **values}))


def test_a_step_with_nothing_to_predict_is_not_in_the_window() -> None:
    """With its loss as 0, the median fell to 0 and every step that had something to learn was a spike."""
    ours, without = guard(), guard()
    for loss in (8.0, 7.9, 8.1, 7.8, 7.7):
        ours.nothing_predicted()
        ours.nothing_predicted()
        assert ours.limit() == without.limit()
        assert ours.decide(loss, ours.limit(), applied=True) is GuardDecision.GOOD
        without.decide(loss, without.limit(), applied=True)
    assert 8 < ours.limit() < math.inf
    assert ours.state() == without.state()


def test_skips_in_a_row_are_counted_across_steps_with_nothing_to_predict() -> None:
    """They are one row, and the state to return to is the one before the first of them."""
    ours = guard(max_skips_in_a_row=2, on_spike=SpikeAction.skip)
    ours.nothing_predicted()
    assert ours.decide(math.nan, math.inf, applied=False) is GuardDecision.SKIPPED
    ours.nothing_predicted()
    again = LossGuard(LossGuardConfig(max_skips_in_a_row=2), json.loads(json.dumps(ours.state())))
    for one in (ours, again):
        assert one.decide(math.nan, math.inf, applied=False) is GuardDecision.ROLL_BACK
        assert (one.skips_in_a_row, one.steps_since_good) == (2, 3)
    assert ours.decide(3.0, math.inf, applied=True) is GuardDecision.GOOD
    assert ours.steps_since_good == 0


def test_a_state_of_before_is_read() -> None:
    assert LossGuard(LossGuardConfig(), {"losses": [1.0], "skips": 2}).steps_since_good == 2
