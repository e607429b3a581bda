"""Measure what the moving average of the weights costs a step: `python benchmarks/ema_cost.py [KEY=VALUE ...]`

Trains the model of conf/model/tiny.yaml (or another one, as in model=125m) in this process, with steps that update the
average and steps that do not in turn. Prints the CPU time of each kind of step and of the update alone (user and
system, median and range), their ratio, and the bytes that the average takes.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor

from pretrain.batch import Batch
from pretrain.config import TrainConfig, load_config
from pretrain.distributed import init_world, shutdown_world
from pretrain.engine.engine import Engine

STEPS = 24
USUAL = [
    *("run_dir=unused", "data.manifest=unused", "total_steps=1000", "model.vocab_size=8192"),
    *("global_batch_sequences=8", "micro_batch_sequences=4", "data.sequence_length=256"),
    *("engine.precision=fp32", "ema.decay=0.999", "ema.every_steps=2", "kernels=eager"),
]


def random_batch(config: TrainConfig, generator: torch.Generator) -> Batch:
    """One micro batch of random tokens, each sequence a document."""
    shape = (config.micro_batch, config.data.sequence_length)
    tokens = torch.randint(0, 8192, shape, generator=generator)
    positions = torch.arange(shape[1]).expand(shape).contiguous()
    zeros: Tensor = torch.zeros_like(tokens)
    return Batch(tokens, tokens.roll(-1, 1), positions, zeros, zeros[:, 0].numpy())


def spread(values: list[float]) -> str:
    """Values in milliseconds as their median and range."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{1e3 * middle:.1f} ms ({1e3 * low:.1f} to {1e3 * high:.1f})"


def main() -> None:
    """Do the steps and print the figures."""
    config = load_config(TrainConfig, [*USUAL, *sys.argv[1:]], "config")
    world = init_world(60)
    engine = Engine(config, world)
    generator = torch.Generator().manual_seed(0)
    count = config.global_batch_sequences // config.micro_batch
    cpu_s: dict[bool, list[float]] = {True: [], False: []}
    update_s = []
    for step in range(1, STEPS + 1):
        batches = [random_batch(config, generator) for _ in range(count)]
        began = time.process_time()
        engine.train_step(batches, step, lr=1e-4)
        if step > 4:  # the first ones allocate memory
            cpu_s[config.ema.share_at(step) is not None].append(time.process_time() - began)
        engine.state.sums.forget()
        began = time.process_time()
        engine.state.update_ema(0.999)
        update_s.append(time.process_time() - began)
    n_parameters = sum(torch.Size(shape).numel() for shape in engine.state.shapes.values())
    held = sum(tensor.nbytes for tensor in engine.state._ema.values())
    plain, averaging, update = (statistics.median(v) for v in (cpu_s[False], cpu_s[True], update_s))
    print(f"{n_parameters:,} parameters, {count} micro batches of {config.micro_batch_tokens} tokens")
    print(f"step without an update: {spread(cpu_s[False])}")
    print(f"step with an update: {spread(cpu_s[True])}")
    print(f"update alone: {spread(update_s)}, {update / plain:.2%} of a step's CPU time")
    print(f"ratio of the medians of the steps: {averaging / plain:.3f}")
    print(f"memory: {held:,} bytes, {held / n_parameters:.2f} per parameter")
    shutdown_world()


if __name__ == "__main__":
    main()
