"""Averages the weights of several checkpoints of a run, which often predict better than the last one alone.

The average of the last checkpoints before the learning rate decays stands for part of that decay (Izmailov et al.,
"Averaging weights leads to wider optima and better generalization", 2018). Evaluate both before you choose.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from pretrain.checkpoint.folder import list_checkpoints, root_of_run, step_of
from pretrain.convert.weights_only import save_weights
from pretrain.errors import ConfigError
from pretrain.files import published_together
from pretrain.trained import TrainedModel, load_trained


def last_steps(run_dir: str, count: int, target: str | None = None) -> list[int]:
    """The steps of the last `count` checkpoints of a run, in ascending order. Raises ConfigError if there are fewer."""
    if not Path(run_dir).is_dir():
        raise ConfigError(f"run_dir={run_dir} does not exist")
    steps = sorted(step_of(path) for path in list_checkpoints(root_of_run(Path(run_dir), target)))
    if len(steps) < count:
        held = ", ".join(map(str, steps)) or "none"
        raise ConfigError(
            f"last={count}, but run_dir={run_dir} holds {len(steps)} checkpoints (steps: {held})"
        )
    return steps[-count:]


def average(run_dir: str, steps: list[int], output: Path, target: str | None = None) -> TrainedModel:
    """Write the mean of the weights at these steps as a run folder, at the last of them. Raises ConfigError.

    One checkpoint at a time is in memory, beside the sum, which is fp64: 12 bytes per parameter in all.
    """
    total: dict[str, torch.Tensor] = {}
    for step in steps:
        trained = load_trained(run_dir, step, target)
        if not total:
            total = {name: weight.double() for name, weight in trained.weights.items()}
            continue
        for name, weight in trained.weights.items():
            total[name] += weight
    mean = replace(trained, weights={name: (weight / len(steps)).float() for name, weight in total.items()})
    with published_together(output) as temporary:
        save_weights(temporary, mean)
    return mean
