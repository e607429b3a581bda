"""One rank of the tests of sequence parallelism. Argument: a JSON list of jobs, which are done one after another.

A job is an object {stage, precision, shared_by, steps, out, load?, save?, overrides?}.

Each job trains on sequences of several documents that cross the borders between the ranks' parts, and writes losses,
gradient norms and the evaluated loss.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch

from pretrain.batch import Batch
from pretrain.checkpoint import tensors as checkpoint
from pretrain.distributed import World, init_world, shutdown_world, sum_over_ranks
from pretrain.engine.engine import Engine
from support.run_states import run_state
from support.workers.engine_worker import GLOBAL, LR, VOCAB, T, batch_of, small_config

HEADS = ["model.n_heads=8", "model.n_kv_heads=4", "model.d_head=4"]


def documents_of(samples: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Document ids, and positions within the documents. Borders are at odd places and differ between samples."""
    borders = torch.tensor([[5 + int(s) % 7, 15 + int(s) % 3, 17 + int(s) % 9] for s in samples])
    at = torch.arange(T)
    ids = (at[None, None] >= borders[..., None]).sum(1)
    starts = torch.cat([torch.zeros(len(samples), 1, dtype=torch.int64), borders], 1)
    return ids, at[None] - starts.gather(1, ids)


def batches_of_step(step: int, world: World) -> list[Batch]:
    share = GLOBAL // world.n_readers
    mine = np.arange(share) + (step - 1) * GLOBAL + world.reader * share
    batches = []
    for samples in (mine[i : i + 2] for i in range(0, share, 2)):
        batch, (ids, positions) = batch_of(samples), documents_of(samples)
        labels = (batch.tokens + 3) % VOCAB  # the rule of `batch_of`
        labels[:, :-1][ids[:, :-1] != ids[:, 1:]] = -100
        labels[
            torch.from_numpy(samples % 3 == 0), T // 2 :
        ] = -100  # so that ranks predict different numbers of tokens
        batches.append(batch._replace(labels=labels, positions=positions, document_ids=ids))
    return batches


def run(job: dict, world: World) -> None:
    world = replace(world, sequence_ranks=job["shared_by"])
    shared_by = f"engine.sequence_parallel_ranks={job['shared_by']}"
    config = small_config(job["stage"], job["precision"], [*HEADS, shared_by, *job.get("overrides", [])])
    engine = Engine(config, world)
    first = 1
    if "load" in job:
        found = checkpoint.find_latest(Path(job["load"]).parent.parent, world).verified
        assert found is not None
        state, held = found.state, engine.state
        partitions = checkpoint.load(found, held.weight_keys + held.moment_keys, held.shapes, world)
        held.restore(partitions, state["optimizer_step"])
        first = state["step"] + 1
    last = first + job["steps"] - 1
    losses, norms = [], []
    for step in range(first, last + 1):
        result = engine.train_step(batches_of_step(step, world), step, lr=LR)
        (nll,) = sum_over_ranks([float(result.nll_sum)], world)
        losses.append(nll / result.n_predicted)
        norms.append(result.grad_norm)
    sums = [engine.evaluate(batch) for batch in batches_of_step(1, world)]
    each = [engine.evaluate(batch, by_sequence=True) for batch in batches_of_step(1, world)]
    for whole, rows in zip(sums, each, strict=True):  # of this rank's part of each sequence
        assert torch.allclose(rows.nll_sum.sum(), whole.nll_sum, rtol=1e-4)
        assert int(rows.n_predicted.sum()) == int(whole.n_predicted)
    both = [float(sum(s.nll_sum for s in sums)), float(sum(s.n_predicted for s in sums))]
    nll, n_predicted = sum_over_ranks(both, world)
    if "save" in job:
        state = run_state(last, engine.state.shapes, optimizer_step=engine.state.optimizer_step)
        checkpoint.save(Path(job["save"]), last, engine.state.snapshot(), state, world)
    if world.is_main:
        found = {"losses": losses, "norms": norms, "heldout": nll / n_predicted, "predicted": n_predicted}
        Path(job["out"]).write_text(json.dumps(found))


def main() -> None:
    world = init_world(60)
    for job in json.loads(sys.argv[1]):
        run(job, world)
    shutdown_world()


if __name__ == "__main__":
    main()
