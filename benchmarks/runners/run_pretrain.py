"""Runner for this program: the engine's training step, as launch/train.py calls it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from own_batches import SYNTHETIC, synthetic_batches, train_config

from benchmarks.harness.worker import Meter, read_job
from pretrain.batch import Batch
from pretrain.config import TrainConfig
from pretrain.data.loader import TrainLoader
from pretrain.distributed import World, init_world, shutdown_world
from pretrain.engine.engine import Engine


def corpus_batches(config: TrainConfig, world: World) -> Iterator[list[Batch]]:
    """This rank's micro-batches of each step, read as in training."""
    return TrainLoader(
        config.data,
        config.seed,
        global_batch_sequences=config.global_batch_sequences,
        micro_batch_sequences=config.micro_batch_sequences,
        rank=world.rank,
        world_size=world.size,
        total_steps=config.total_steps,
        total_tokens=config.total_tokens,
        total_epochs=config.total_epochs,
        state=None,
    ).steps(1)


def main() -> None:
    job, folder = read_job()
    config = train_config(job)
    world = init_world(config.engine.timeout_s)
    engine = Engine(config, world)
    meter = Meter(job, folder, world.device)
    engine._forward = meter.part("forward", engine._forward)
    engine._deepspeed.backward = meter.part("backward", engine._deepspeed.backward)
    engine._deepspeed.step = meter.part("optimizer", engine._deepspeed.step)
    synthetic = config.data.manifest == SYNTHETIC
    batches = synthetic_batches(job, world.rank) if synthetic else corpus_batches(config, world)
    following = meter.part("data", lambda: next(batches))

    def train_step(step: int) -> torch.Tensor:
        result = engine.train_step(following(), step + 1, lr=config.optim.lr)
        return result.nll_sum * world.size / result.n_predicted

    meter.measure(train_step)
    n_parameters = sum(torch.Size(shape).numel() for shape in engine.state.shapes.values())
    meter.report(n_parameters, deepspeed=version("deepspeed"))
    engine.close()
    shutdown_world()


if __name__ == "__main__":
    main()
