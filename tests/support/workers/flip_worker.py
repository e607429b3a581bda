"""Train with one flipped bit: `flip_worker.py KIND RANK STEP ...`, followed by the arguments of launch/train.py.

KIND says where the bit is flipped. `master`, `exp_avg` and `working` are this rank's part of these tensors, and
`replica` is a parameter that every rank holds whole; all of these are changed before the update of STEP. `copy` is the
same parameter as `replica`, but after the update of STEP, so that the ranks differ from then on.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def flip(tensor) -> None:
    import torch

    octets = tensor.detach().reshape(-1).view(torch.uint8)
    octets[1] ^= 1  # a bit in the second byte of an element changes it little and keeps it finite


def tensor_of(engine, kind: str):
    match kind:
        case "master":
            return next(iter(engine.state._placements))
        case "exp_avg":
            return engine._optimizer.state[next(iter(engine.state._placements))]["exp_avg"]
        case "working":
            return engine._deepspeed.optimizer.fp16_partitioned_groups_flat[0]
    return engine.state._replicated_state()[0]


def main() -> None:
    kind, victim, at_step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    from pretrain.engine.bit_sums import StateSums
    from pretrain.engine.engine import Engine

    train_step, remember = Engine.train_step, StateSums.remember
    now = [0]

    def flipping_step(self, batches, step, *rest):
        now[0] = step if self.world.rank == victim else -1
        if kind != "copy" and now[0] == at_step:
            flip(tensor_of(self, kind))
        return train_step(self, batches, step, *rest)

    def flipping_remember(self):
        if kind == "copy" and now[0] == at_step:
            flip(self._replicated()[0])
        remember(self)

    Engine.train_step, StateSums.remember = flipping_step, flipping_remember
    sys.argv = ["launch/train.py", *sys.argv[4:]]
    runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")


if __name__ == "__main__":
    main()
