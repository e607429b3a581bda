"""How long the training run of the quickstart is: chosen when its first half was measured, and remembered.

Needs nothing but the standard library: the quickstart may have to make its environment first.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pretrain.files import write_atomically

LONGEST_STEPS = 800
"""Length of a run that the clock does not shorten: total_steps of conf/experiment/quickstart.yaml."""
FEWEST_STEPS = 200
"""The shortest run that the clock may choose. After 150 steps the held-out loss was 6% below the unigram entropy."""
WARMUP_STEPS = 20
FIRST_HALF_FRAC = 0.4
"""Share of the time left that the first half may take; the second half and what follows need the rest."""
SHORTEST_HALF_S = 60.0
"""Enough for some steps after a slow start; either half gets it however little time is left."""
USABLE_FRAC = 0.9
"""Share of the time left that is planned with, because the speed of a shared machine varies."""
AFTER_STARTS, AFTER_STEPS = 2.0, 35.0
"""Time of evaluation, export and sample, in starts and steps of the training run."""


@dataclass(frozen=True)
class Measured:
    """What the first half of the run showed."""

    steps: int
    """Steps completed so far."""
    step_s: float
    """Time per step."""
    start_s: float
    """Time that a start of the run takes beside its steps: imports, checkpoints, held-out losses."""


@dataclass(frozen=True)
class Length:
    """The length of the run."""

    steps: int
    stop_step: int
    """The step after which the run stops as planned, and resumes."""
    reason: str
    """One sentence that says why."""
    after_s: float | None
    """Time to leave for evaluation, export and sample; None: the length was given by --steps, and no clock counts."""

    @property
    def has_clock(self) -> bool:
        """Whether the second half may end early: the length was chosen, and is more than the shortest one."""
        return self.after_s is not None and self.steps > FEWEST_STEPS

    def shortened(self, done: int) -> Length:
        """The length after the clock has stopped the second half at step `done`."""
        steps = max(done, FEWEST_STEPS)
        return replace(
            self, steps=steps, reason=f"{steps} steps: this machine has become slower since the choice."
        )

    def save(self, path: Path) -> None:
        """Keep it for later starts of the quickstart in the same folder."""
        write_atomically(path, (json.dumps(asdict(self), indent=1) + "\n").encode())

    @staticmethod
    def load(path: Path) -> Length | None:
        """What an earlier start chose; None: nothing was chosen yet."""
        return Length(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def choose_length(measured: Measured, left_s: float, minutes: float) -> Length:
    """The longest run with which the job ends in `left_s`, from FEWEST_STEPS to LONGEST_STEPS.

    At least one step is still to come. `minutes` is what the user gave for the whole job.
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
    """How long the first half may take, its start included, where the whole job has `left_s`."""
    return max(SHORTEST_HALF_S, FIRST_HALF_FRAC * left_s)


def second_half_limit_s(length: Length, left_s: float) -> float:
    """How long the second half may take, its start included."""
    return max(SHORTEST_HALF_S, left_s - (length.after_s or 0.0))


def length_overrides(steps: int) -> list[str]:
    """Keys of a run of this length. Only the second half's learning rate depends on it: it falls from there on."""
    warmup_steps = max(1, min(WARMUP_STEPS, steps // 3))
    return [
        f"total_steps={steps}",
        f"schedule.warmup_steps={warmup_steps}",
        f"schedule.decay_steps={steps - steps // 2}",
    ]
