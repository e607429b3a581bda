"""One rank that counts: bytes of collectives per step, and bytes of state held, of a real run of the engine.

Argument: a JSON list of jobs {stage, precision, overrides, out}. Every collective of torch.distributed is wrapped
before DeepSpeed is imported; each job is one engine, two steps, of which the second is counted.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

COUNTED: Counter[str] = Counter()
"""`kind dtype` -> bytes of the whole tensor that a collective moves (before the (N-1)/N of a ring)."""
CALLS: Counter[str] = Counter()


def counting(name: str, size: Callable[..., tuple[int, torch.dtype]]) -> None:
    """Replace dist.<name> by one that counts first."""
    inner = getattr(dist, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        n_bytes, dtype = size(*args, **kwargs)
        COUNTED[f"{name} {dtype}".replace("torch.", "")] += n_bytes
        CALLS[f"{name} {dtype}".replace("torch.", "")] += 1
        return inner(*args, **kwargs)

    setattr(dist, name, call)


def of(tensor: torch.Tensor) -> tuple[int, torch.dtype]:
    return tensor.numel() * tensor.element_size(), tensor.dtype


def of_all(tensors: list[torch.Tensor]) -> tuple[int, torch.dtype]:
    return sum(of(tensor)[0] for tensor in tensors), tensors[0].dtype


counting("all_reduce", lambda tensor, *a, **k: of(tensor))
counting("reduce", lambda tensor, *a, **k: of(tensor))
counting("broadcast", lambda tensor, *a, **k: of(tensor))
counting("all_gather", lambda tensor_list, *a, **k: of_all(tensor_list))
counting("all_gather_into_tensor", lambda output_tensor, *a, **k: of(output_tensor))
counting("reduce_scatter_tensor", lambda output, input, *a, **k: of(input))
counting("reduce_scatter", lambda output, input_list, *a, **k: of_all(input_list))
counting("all_to_all_single", lambda output, *a, **k: of(output))

from engine_worker import batches_of_step, small_config

from pretrain.distributed import World, init_world, shutdown_world
from pretrain.engine import Engine


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the different storages behind some tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def held(engine: Engine, stage: int) -> dict[str, int]:
    """Bytes that this rank holds between two updates, by part; `state`: of all together, each storage once."""
    masters, parameters = list(engine.state._pieces), list(engine._parameters.values())
    found = {
        "moments": [t for s in engine._optimizer.state.values() for kind, t in s.items() if kind != "step"],
        "masters": masters,
        "parameters": [p.ds_tensor if stage == 3 else p.data for p in parameters],
    }
    if stage == 3:
        found["persistent parameters"] = [p.data for p in parameters if p.ds_persist]
        found["gradients"] = [engine._deepspeed.optimizer.grad_partitions_flat_buffer]
    sizes = {name: storage_bytes(tensors) for name, tensors in found.items()}
    state = [t for name, tensors in found.items() if name != "gradients" for t in tensors]
    return sizes | {"state": storage_bytes(state)}


def gradients_at_rest(engine: Engine) -> list[int]:
    """Fills with the bytes of gradients at rest after each micro batch, before the update (stages 0 to 2)."""
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


def run(job: dict, world: World) -> None:
    config = small_config(job["stage"], job["precision"], job.get("overrides", []))
    engine = Engine(config, world)
    micro = config.micro_batch_sequences
    seen = gradients_at_rest(engine) if job["stage"] < 3 else []
    for step in (1, 2):
        COUNTED.clear()
        CALLS.clear()
        engine.train_step(batches_of_step(step, world, micro), step, lr=1e-3)
    result = {
        "bytes": dict(COUNTED),
        "calls": dict(CALLS),
        "held": held(engine, job["stage"]),
        "snapshot": sum(partition.values.nbytes for partition in engine.state.snapshot().values()),
    }
    if seen:
        result["held"]["gradients"] = max(seen)
    Path(f"{job['out']}.{world.rank}.json").write_text(json.dumps(result))


def main() -> None:
    world = init_world(60)
    for job in json.loads(sys.argv[1]):
        run(job, world)
    shutdown_world()


if __name__ == "__main__":
    main()
