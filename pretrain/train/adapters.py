"""What a run of adapters checks at its end, because a mistake in adapters is silent: the loss is that of the base.

The frozen weights are checked at each save (`EngineState.snapshot`), and the number of adapters when they are made
(`add_adapters`) and here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint import tensors as checkpoint
from pretrain.checkpoint.tensors import CheckpointError
from pretrain.config import TrainConfig
from pretrain.distributed import World, gather_objects, sum_over_ranks
from pretrain.engine.state import EngineState, same_rounded
from pretrain.errors import ConfigError, RunError
from pretrain.model.lora import expected_adapters, n_adapters


def check_adapters(
    config: TrainConfig, state: EngineState, root: Path, step: int, world: World
) -> dict[str, Any]:
    """Raise unless the checkpoint of this step holds the adapters that were trained. All ranks call this together.

    Returns the facts for the event `adapters_checked`. Raises ConfigError where an adapter has learned nothing, and
    RunError where a frozen weight has changed or the checkpoint holds something else than what is in memory.
    """
    live = {key: part.values for key, part in state.snapshot().items() if key.startswith("weight.")}
    found = checkpoint.find_latest(root, world, step=step)
    if found.verified is None:
        raise CheckpointError(
            f"the adapters of step {step} are in no checkpoint ({'; '.join(found.passed_over) or 'none'})"
        )
    count, expected = (
        n_adapters(list(found.verified.state["tensors"])),
        expected_adapters(config.lora, config.model),
    )
    if count != expected:
        raise RunError(
            f"{found.verified.path} holds {count} adapters, but {expected} were trained; start again"
        )
    saved = checkpoint.load(found.verified, list(live), state.shapes, world)
    different = [
        key
        for key, values in live.items()
        if not torch.equal(saved[key], values)
        or not same_rounded(saved[key], state.working_share(key.removeprefix("weight.")))
    ]
    if names := sorted(
        {name.removeprefix("weight.") for part in gather_objects(different, world) for name in part}
    ):
        raise RunError(
            f"{found.verified.path} does not hold what was trained: {names[0]} ({len(names)} in all) differs from what "
            "is in memory; start again from the checkpoint before it"
        )
    return {"adapters": count, "trained_parameters": state.n_trained, "norm": _norm(live, step, world)}


def _norm(live: dict[str, torch.Tensor], step: int, world: World) -> float:
    """The norm of all second factors, which begin as 0. Raises ConfigError where one still is 0."""
    keys = [key for key in live if key.endswith(".lora_B.weight")]
    squares = sum_over_ranks([float(live[key].double().square().sum()) for key in keys], world)
    still = [key.removeprefix("weight.") for key, square in zip(keys, squares, strict=True) if not square > 0]
    if still:
        raise ConfigError(
            f"{len(still)} of {len(keys)} adapters are still 0 at step {step} ({still[0]} is the first), so they have "
            "learned nothing; look at the events for updates that were left out, and at optim.lr"
        )
    return math.sqrt(sum(squares))
