"""Guards a run against divergence: bad updates are skipped, and too many of them in a row cause a rollback."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from enum import Enum
from typing import Any

from pretrain.config import LossGuardConfig, SpikeAction


class GuardDecision(Enum):
    """The loss guard's decision about a step."""

    GOOD = "good"
    SKIPPED = "skipped"
    ROLL_BACK = "roll back"


class LossGuard:
    """Decides whether a step was good, based on its loss. Given the same numbers, all ranks decide the same.

    `state` is the value of `state()` from the checkpoint, so a resumed run decides as an uninterrupted one would.
    """

    def __init__(self, config: LossGuardConfig, state: Mapping[str, Any] | None = None) -> None:
        self._config = config
        self._losses: deque[float] = deque(state["losses"] if state else [], config.window_steps)
        self._skips: int = state["skips"] if state else 0
        """Number of consecutive skipped updates."""
        self._pauses: int = state.get("pauses", 0) if state else 0
        """Number of steps without a token to predict since the first of these skipped updates."""

    def state(self) -> dict[str, Any]:
        """The state as plain JSON values."""
        return {"losses": list(self._losses), "skips": self._skips, "pauses": self._pauses}

    def limit(self) -> float:
        """The loss above which the next step is a spike: median + spike_sigmas x 1.4826 x median absolute deviation.

        It is infinite until `window_steps` losses are known.
        """
        sigmas = self._config.spike_sigmas
        if sigmas is None or len(self._losses) < self._config.window_steps:
            return math.inf
        median = statistics.median(self._losses)
        deviation = statistics.median(abs(loss - median) for loss in self._losses)
        return (
            median + sigmas * 1.4826 * deviation
        )  # times 1.4826, the deviation estimates the standard deviation of a normal distribution

    def decide(self, loss: float, limit: float, *, applied: bool) -> GuardDecision:
        """What to do after a step with this loss. `limit` is the value of `limit()` before the step.

        `applied` says whether the update was applied or skipped.
        """
        if applied:
            self._losses.append(loss)
            self._skips = self._pauses = 0
            return GuardDecision.GOOD
        self._skips += 1
        spike = loss > limit and self._config.on_spike is SpikeAction.rollback
        if spike or self._skips >= self._config.max_skips_in_a_row:
            return GuardDecision.ROLL_BACK
        return GuardDecision.SKIPPED

    def nothing_predicted(self) -> None:
        """Note a step without a token to predict. It has no loss, so it is neither good nor bad."""
        if self._skips:
            self._pauses += 1

    @property
    def steps_since_good(self) -> int:
        """Number of steps from the first of the consecutive skipped updates to the last step."""
        return self._skips + self._pauses

    @property
    def skips_in_a_row(self) -> int:
        """Number of consecutive skipped updates, including the last step."""
        return self._skips
