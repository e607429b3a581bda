"""Ends a run early when the held-out loss no longer falls. Its counters are part of the training state."""

from __future__ import annotations

import math

from pretrain.checkpoint.state import EarlyStopState
from pretrain.config import EvaluationConfig


class EarlyStop:
    """Counts the evaluations in a row that brought no gain.

    A gain is a loss that is lower than that of the last gain, by at least `evaluation.min_gain`. So several small falls
    add up to a gain. All ranks pass the same losses.
    """

    def __init__(self, config: EvaluationConfig, state: EarlyStopState | None = None) -> None:
        self._config = config
        self.step = state["step"] if state else 0
        """The step of the newest evaluation that was counted; 0 without one."""
        self._best_step = state["best_step"] if state else 0
        self._best_loss = state["best_loss"] if state else None
        self._without_gain = state["without_gain"] if state else 0

    def note(self, step: int, loss: float) -> None:
        """Count the evaluation of a step, once. A loss that is not finite is no gain."""
        if step <= self.step:
            return
        self.step = step
        best = math.inf if self._best_loss is None else self._best_loss
        if math.isfinite(loss) and loss < best and best - loss >= self._config.min_gain:
            self._best_step, self._best_loss, self._without_gain = step, loss, 0
        else:
            self._without_gain += 1

    @property
    def reason(self) -> str | None:
        """Why the run ends now; None if it goes on."""
        patience = self._config.patience
        if patience is None or self._without_gain < patience:
            return None
        gain = f"a gain of {self._config.min_gain:g}" if self._config.min_gain else "a gain"
        last = (
            "no loss was finite"
            if self._best_loss is None
            else f"{self._best_loss:.4f} at step {self._best_step}"
        )
        return (
            f"stopped early: {self._without_gain} evaluations in a row without {gain} in heldout/"
            f"{self._config.deciding_metric} (last gain: {last})"
        )

    def state(self) -> EarlyStopState:
        """The counters, for a checkpoint."""
        return {
            "step": self.step,
            "best_step": self._best_step,
            "best_loss": self._best_loss,
            "without_gain": self._without_gain,
        }
