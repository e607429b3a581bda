"""One rank that trains a shrunken form of each recipe for three steps. Arguments: a file for the losses, then names."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from pretrain.config import Precision
from pretrain.distributed import init_world, shutdown_world
from pretrain.engine.engine import Engine
from support.recipes import shrunken
from support.workers.engine_worker import batches_of_step

STEPS = 3


def main() -> None:
    out, *names = sys.argv[1:]
    world = init_world(60)
    losses = {}
    for name in names:
        config = shrunken(name)
        config.engine.precision = Precision.fp32
        engine = Engine(config, world)
        losses[name] = []
        for step in range(1, STEPS + 1):
            # The same batch each time, so that the loss falls even at a low rate.
            result = engine.train_step(batches_of_step(1, world), step, lr=config.optim.lr)
            losses[name].append(float(result.nll_sum) / result.n_predicted)
        engine.close()
    Path(out).write_text(json.dumps(losses))
    shutdown_world()


if __name__ == "__main__":
    main()
