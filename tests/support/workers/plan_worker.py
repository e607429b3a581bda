"""One rank that counts the bytes of collectives per step, and of stored state, in a real run of the engine.

Argument: a JSON list of jobs {stage, precision, overrides, out}. Each job makes an engine and does two steps, of which
the second is counted. The base of adapters are random weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch

from benchmarks.harness.collectives import Traffic, counted, watch
from pretrain.config import TrainConfig
from pretrain.distributed import World, init_world, share, shutdown_world
from pretrain.engine.engine import Engine
from pretrain.model.decoder import Decoder
from support.workers.engine_worker import batches_of_step, small_config


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    """Total bytes of the storages of some tensors, each storage counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def held(engine: Engine, stage: int) -> dict[str, int]:
    """Bytes that this rank holds between two updates, by part. `state` is all of it, each storage counted once."""
    masters = list(engine.state._placements)
    parameters = [*engine._parameters.values(), *engine.state._frozen.values()]
    found = {
        "moments": [t for s in engine._optimizer.state.values() for kind, t in s.items() if kind != "step"],
        "masters": masters,
        "parameters": [p.ds_tensor if stage == 3 else p.data for p in parameters],
    }
    if engine.state.ema_keys:
        found["moving average"] = list(engine.state._ema.values())
    if stage == 3:
        found["persistent parameters"] = [p.data for p in parameters if p.ds_persist]
        found["gradients"] = [engine._deepspeed.optimizer.grad_partitions_flat_buffer]
    sizes = {name: storage_bytes(tensors) for name, tensors in found.items()}
    state = [t for name, tensors in found.items() if name != "gradients" for t in tensors]
    return sizes | {"state": storage_bytes(state)}


def base_of(config: TrainConfig, world: World) -> dict[str, torch.Tensor]:
    """This rank's share of each of the weights that adapters are trained on."""
    named = Decoder(config.model, seed=1).named_parameters()
    return {f"weight.{name}": p.detach().flatten()[slice(*share(p.numel(), world))] for name, p in named}


def gradients_at_rest(engine: Engine) -> list[int]:
    """A list that gets the bytes of stored gradients after each micro batch, before the update (stages 0 to 2)."""
    seen: list[int] = []
    inner = engine._deepspeed.step

    def step(*args: Any, **kwargs: Any) -> Any:
        averaged = getattr(engine._deepspeed.optimizer, "averaged_gradients", {})
        tensors = [t for group in averaged.values() for t in group or [] if t is not None]
        tensors += [p.grad for p in engine._parameters.values() if p.grad is not None]
        seen.append(storage_bytes(tensors))
        return inner(*args, **kwargs)

    engine._deepspeed.step = step
    return seen


def phased(traffic: Traffic, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does the same, but counts the bytes that it moves for this phase."""

    def inner(*args: Any, **kwargs: Any) -> Any:
        traffic.phase = phase
        try:
            return call(*args, **kwargs)
        finally:
            traffic.phase = ""

    return inner


def run(job: dict, world: World) -> None:
    config = small_config(job["stage"], job["precision"], job.get("overrides", []))
    engine = Engine(config, world, base_of(config, world) if config.lora.r else None)
    micro = config.micro_batch_sequences
    seen = gradients_at_rest(engine) if job["stage"] < 3 else []
    traffic = Traffic()
    engine._forward = phased(traffic, "forward", engine._forward)
    engine._deepspeed.backward = phased(traffic, "backward", engine._deepspeed.backward)
    engine._deepspeed.step = phased(traffic, "update", engine._deepspeed.step)
    engine.train_step(batches_of_step(1, world, micro), 1, lr=1e-3)
    with counted(traffic):
        engine.train_step(batches_of_step(2, world, micro), 2, lr=1e-3)
    result = {
        "bytes": traffic.by_kind(traffic.bytes),
        "calls": traffic.by_kind(traffic.calls),
        "kinds": sorted([*kind, traffic.calls[kind], traffic.bytes[kind]] for kind in traffic.calls),
        "held": held(engine, job["stage"]),
        "snapshot": sum(partition.values.nbytes for partition in engine.state.snapshot().values()),
    }
    if seen:
        result["held"]["gradients"] = max(seen)
    Path(f"{job['out']}.{world.rank}.json").write_text(json.dumps(result))


def main() -> None:
    watch()
    world = init_world(60)
    for job in json.loads(sys.argv[1]):
        run(job, world)
    shutdown_world()


if __name__ == "__main__":
    main()
