"""Dynamic loss scaling for fp16, in which small gradients would otherwise round to zero. Imports no torch.

The loss is multiplied by the scale, and the gradient divided by it before the update. A scale that is too large makes
a gradient infinite; that update is skipped, and the scale is halved (Micikevicius et al., Mixed Precision Training,
2018). DeepSpeed's own scaler is not used, because when it doubles the scale it divides the gradient of that step,
which was computed with the old scale, by the new one (ZeRO stages 1 to 3, release 0.19.8).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

INITIAL = 2.0**16
SMALLEST = 1.0
GROWTH_STEPS = 1000
"""The scale is doubled after this number of consecutive applied updates."""


class LossScale:
    """The scale of the next step. It is the same on every rank if all ranks call `update` with the same arguments."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        """`state` is what `state()` returned when the checkpoint was written."""
        self.value: float = state["value"] if state else INITIAL
        self._applied: int = state["applied"] if state else 0
        """Number of consecutive applied updates since the scale last changed."""

    def state(self) -> dict[str, Any]:
        """The state as plain JSON values."""
        return {"value": self.value, "applied": self._applied}

    def update(self, *, applied: bool, loss: float, limit: float) -> bool:
        """Adjust the scale after a step. Returns whether the update was skipped only because the scale was too large.

        `loss` is the loss of the step, and `limit` the loss above which an update is skipped in any case. The scale is
        not the cause if the loss is not finite or above the limit, or if the gradient overflows at the smallest scale.
        """
        if applied:
            self._applied += 1
            if self._applied == GROWTH_STEPS:
                self.value, self._applied = self.value * 2, 0
            return False
        if not math.isfinite(loss) or loss > limit or self.value <= SMALLEST:
            return False
        self.value, self._applied = self.value / 2, 0
        return True
