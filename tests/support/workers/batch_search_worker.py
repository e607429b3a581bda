"""One rank of the tests of the batch search. Argument: a JSON object {cases, out}.

A case is named stage-precision or stage-precision-offload. For each, this records the batch sizes that are found
without a memory limit and with one between two candidates, then losses, norms and state of a run with the size that was
found, and of a run with the same size given.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from pretrain.config import TrainConfig
from pretrain.distributed import World, init_world, shutdown_world, sum_over_ranks
from pretrain.engine.engine import Engine
from pretrain.engine.micro_batch import USABLE_FRAC, FoundMicroBatch, find_micro_batch
from pretrain.errors import ConfigError
from support.workers.engine_worker import LR, batches_of_step, small_config

GLOBAL = 16
# Wide enough that the activations of one sequence, about 10 MiB, are much larger than the rounding of an allocator.
WIDE = ["data.sequence_length=256", "model.d_model=128", "model.d_ff=512", f"global_batch_sequences={GLOBAL}"]


def config_with(case: str, micro: int | str) -> TrainConfig:
    stage, precision, *offload = case.split("-")
    more = [f"micro_batch_sequences={micro}", "model.dropout=0.1"]
    more += ["engine.offload_optimizer=true"] if offload else []
    return small_config(int(stage), precision, [*WIDE, *more])


def trained(engine: Engine, micro: int, world: World) -> dict:
    """Train a few steps. Returns their exact results."""
    losses, norms = [], []
    for step in (1, 2):
        result = engine.train_step(batches_of_step(step, world, micro), step, lr=LR)
        assert not result.memory_changed
        losses.append(sum_over_ranks([float(result.nll_sum)], world)[0].hex())
        norms.append(result.grad_norm.hex())
    digest = hashlib.sha256()
    for partition in engine.state.snapshot().values():
        digest.update(partition.values.numpy().tobytes())
    return {
        "losses": losses,
        "norms": norms,
        "state": digest.hexdigest(),
        "updates": engine.state.optimizer_step,
    }


def run(case: str, world: World) -> dict:
    config = config_with(case, "auto")
    engine = Engine(config, world)

    def search(usable_bytes: float) -> FoundMicroBatch:
        return find_micro_batch(engine, config, world, lambda: int(usable_bytes / USABLE_FRAC))

    free = search(2**50)
    peak = {probe.sequences: probe.peak_bytes for probe in free.probes}
    # Memory is affine in the number of sequences, and half of the largest number lies 0.43 of the way from 2 to the
    # largest, if that is 16 (0.33 if it is 8).
    tight = search(peak[2] + 0.65 * (peak[max(peak)] - peak[2]))
    refused = ""
    try:
        search(2**20)
    except ConfigError as error:
        refused = str(error)
    found = tight.micro_batch_sequences
    given = config_with(case, found)
    engine.set_micro_batch(given)
    return {
        "free": free.facts(),
        "tight": tight.facts(),
        "refused": refused,
        "searched": trained(engine, found, world),
        "given": trained(Engine(given, world), found, world),
    }


def main() -> None:
    job = json.loads(sys.argv[1])
    world = init_world(60)
    results = {case: run(case, world) for case in job["cases"]}
    Path(f"{job['out']}-{world.rank}.json").write_text(json.dumps(results))
    shutdown_world()


if __name__ == "__main__":
    main()
