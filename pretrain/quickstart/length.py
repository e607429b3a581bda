"""Chooses the length of the quickstart's training run after timing its first half, and saves the choice.

This module uses only the standard library, because the quickstart may have to create its environment first.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pretrain.files import write_atomically

LONGEST_STEPS = 800
"""Steps of a run that the time limit does not shorten: total_steps of conf/experiment/quickstart.yaml."""
FEWEST_STEPS = 200
"""Steps of the shortest run that may be chosen. After 150 steps the held-out loss was 6% below the unigram entropy."""
WARMUP_STEPS = 20
FIRST_HALF_FRAC = 0.4
"""Fraction of the remaining time that the first half may take. The second half and the later stages need the rest."""
SHORTEST_HALF_S = 60.0
"""Seconds that each half gets in any case, which are enough for some steps after a slow start."""
USABLE_FRAC = 0.9
"""Fraction of the remaining time that may be planned. The rest is reserve, since a shared machine's speed varies."""
AFTER_STARTS, AFTER_STEPS = 2.0, 35.0
"""The evaluation, the export and the sample together take as long as this number of starts and of steps."""


@dataclass(frozen=True)
class Measured:
    """Measurements of the first half of the run."""

    steps: int
    """Number of steps completed so far."""
    step_s: float
    """Seconds per step."""
    start_s: float
    """Seconds that a start of the run takes in addition to its steps: imports, checkpoints, held-out losses."""


@dataclass(frozen=True)
class Length:
    """The length of the run and the reason for choosing it."""

    steps: int
    """Number of steps of the whole run."""
    stop_step: int
    """The step after which the run stops as planned and is resumed."""
    reason: str
    """One sentence that explains the length."""
    after_s: float | None
    """Seconds to leave for the evaluation, the export and the sample; None where --steps gave the length, so that there
    is no time limit."""

    @property
    def has_clock(self) -> bool:
        """Whether the second half may end early: only where the length was chosen here and is not the shortest one."""
        return self.after_s is not None and self.steps > FEWEST_STEPS

    def shortened(self, done: int) -> Length:
        """The new length after the time limit has stopped the second half at step `done`."""
        steps = max(done, FEWEST_STEPS)
        return replace(
            self,
            steps=steps,
            reason=f"{steps} steps: this machine has become slower since the length was chosen.",
        )

    def save(self, path: Path) -> None:
        """Save the length for later starts of the quickstart in the same folder."""
        write_atomically(path, (json.dumps(asdict(self), indent=1) + "\n").encode())

    @staticmethod
    def load(path: Path) -> Length | None:
        """The length that an earlier start has saved; None where there is none yet."""
        return Length(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def choose_length(measured: Measured, left_s: float, minutes: float) -> Length:
    """The longest run, from FEWEST_STEPS to LONGEST_STEPS, with which the job ends within `left_s` seconds.

    It has at least one step more than the steps already completed. `minutes` is the time that the user gave for the
    whole job.
    """
    after_s = AFTER_STARTS * measured.start_s + AFTER_STEPS * measured.step_s
    rest_s = measured.start_s + after_s
    fitting = measured.steps + int(max(0.0, USABLE_FRAC * left_s - rest_s) / measured.step_s)
    fewest = max(FEWEST_STEPS, measured.steps + 1)
    steps = max(fewest, min(LONGEST_STEPS, fitting))
    needed_s = rest_s + (steps - measured.steps) * measured.step_s
    speed = f"a step takes {measured.step_s:.2f} s on this machine"
    if fitting < fewest:
        total = minutes + (needed_s - left_s) / 60
        reason = (
            f"{steps} steps, the fewest that teach the model something: {speed}, so the whole job will take about "
            f"{total:.0f} minutes instead of {minutes:g}."
        )
    elif fitting >= LONGEST_STEPS:
        reason = (
            f"{steps} steps, the full length: {speed}, and {needed_s:.0f} of the {left_s:.0f} s left suffice."
        )
    else:
        reason = (
            f"{steps} steps: {speed}, and {left_s:.0f} s are left of {minutes:g} minutes, {rest_s:.0f} s of them for "
            "the second start, the evaluation, the export and the sample."
        )
    return Length(steps, measured.steps, reason, after_s)


def first_half_limit_s(left_s: float) -> float:
    """Seconds that the first half may take, including its start, when the whole job has `left_s` seconds left."""
    return max(SHORTEST_HALF_S, FIRST_HALF_FRAC * left_s)


def second_half_limit_s(length: Length, left_s: float) -> float:
    """Seconds that the second half may take, including its start."""
    return max(SHORTEST_HALF_S, left_s - (length.after_s or 0.0))


def length_overrides(steps: int) -> list[str]:
    """Configuration overrides for a run of this length.

    The learning rate decays only in the second half, so the first half does not depend on the length.
    """
    warmup_steps = max(1, min(WARMUP_STEPS, steps // 3))
    return [
        f"total_steps={steps}",
        f"schedule.warmup_steps={warmup_steps}",
        f"schedule.decay_steps={steps - steps // 2}",
    ]
