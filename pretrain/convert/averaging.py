"""Averages the weights of several checkpoints of a run, which often predict better than the last one alone.

The average of the last checkpoints before the learning rate decays stands for part of that decay (Izmailov et al.,
"Averaging weights leads to wider optima and better generalization", 2018). Evaluate both before you choose.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from pretrain.checkpoint.folder import list_checkpoints, root_of_run, step_of
from pretrain.convert.hugging_face import parameter_shapes
from pretrain.convert.streamed import weight_of
from pretrain.convert.weights_only import save_weights
from pretrain.errors import ConfigError
from pretrain.files import published_together
from pretrain.trained import open_trained


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


def average(run_dir: str, steps: list[int], output: Path, target: str | None = None) -> None:
    """Write the mean of the weights at these steps as a run folder, at the last of them. Raises ConfigError.

    One weight at a time is in memory, and its sum in fp64. Checkpoints at a URL are on this disk together meanwhile.
    """
    with ExitStack() as stack:
        parts = [stack.enter_context(open_trained(run_dir, step, target)) for step in steps]

        def mean(name: str) -> torch.Tensor:
            total = parts[0].weights[name].double()
            for part in parts[1:]:
                total += part.weights[name]
            return total.div_(len(parts)).float()

        shapes = parameter_shapes(parts[-1].config.model)
        weights = {
            name: weight_of(shapes[name], torch.float32, partial(mean, name)) for name in parts[-1].weights
        }
        with published_together(output) as temporary:
            save_weights(temporary, parts[-1], weights)
