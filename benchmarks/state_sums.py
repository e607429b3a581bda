"""Measure what the check for flipped bits costs: `python benchmarks/state_sums.py`

Trains the quickstart's model under ZeRO-3 in a single process, with one micro-batch of random tokens per step. Prints
the time of the two passes over weights and moments relative to the time of the whole step, as median and range.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from pretrain.batch import Batch
from pretrain.config import TrainConfig, load_config
from pretrain.distributed import init_world
from pretrain.engine.engine import Engine


def main() -> None:
    """Do the steps and print one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    words = ["run_dir=none", "data.manifest=none", "experiment=quickstart", "model.vocab_size=8192"]
    config = load_config(
        TrainConfig, [*words, "global_batch_sequences=8", "micro_batch_sequences=8"], "config"
    )
    engine = Engine(config, init_world(60))
    shape = (config.micro_batch_sequences, config.data.sequence_length)
    tokens = torch.randint(0, 8192, shape)
    positions = torch.arange(shape[1]).expand(shape).contiguous()
    batch = Batch(tokens, tokens, positions, torch.zeros(shape, dtype=torch.long), torch.arange(shape[0]))
    steps_s, sums_s = [], []
    for step in range(1, options.steps + 3):
        started = time.perf_counter()
        engine.train_step([batch], step, 1e-3)
        done = time.perf_counter()
        engine.state.sums.changed()
        engine.state.sums.remember()
        steps_s.append(done - started)
        sums_s.append(time.perf_counter() - done)
    shares = [100 * sums / step for sums, step in zip(sums_s[2:], steps_s[2:], strict=True)]
    n_parameters = sum(torch.Size(s).numel() for s in engine.state.shapes.values())
    print(
        f"{n_parameters:,} parameters, {tokens.numel():,} tokens per step: step "
        f"{1000 * statistics.median(steps_s[2:]):.0f} ms, sums {1000 * statistics.median(sums_s[2:]):.1f} ms, "
        f"share {statistics.median(shares):.2f}% ({min(shares):.2f} to {max(shares):.2f})"
    )


if __name__ == "__main__":
    main()
