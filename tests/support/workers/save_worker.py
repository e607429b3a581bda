"""Saves checkpoints on request, each in a new process that a tracer may stop.

Reads lines `RUN_DIR STEP KEEP_LAST TRACED` from stdin; with KEEP_LAST 0 the checkpoint of the step is thinned instead.
Each is served by a fork, so that a hundred saves cost one import of torch: this process has only one thread and no
process group. It answers `pid N` immediately and `exit CODE` at the end, where CODE is 0 (saved), 1 (refused;
RUN_DIR.error says why) or minus the signal that ended it.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
import torch._dynamo  # imported before the fork, because importing it would take most of the time of a save
import torch.distributed as dist

from pretrain.checkpoint import tensors as checkpoint
from pretrain.checkpoint.saver import retain
from pretrain.checkpoint.tensors import ALONE, CheckpointError
from pretrain.checkpoint.thinning import remove_leftovers, thin
from pretrain.config import CheckpointConfig, ThinDtype
from pretrain.distributed import Partition
from support.run_states import run_state

SHAPES = {"a": (30,), "b": (7,)}
KINDS = ("weight", "exp_avg")


def save(run_dir: Path, step: int, keep_last: int) -> None:
    """Save a checkpoint in which every value depends on the step, then delete older ones."""
    partitions = {
        f"{kind}.{name}": Partition(torch.full(shape, float(step)), shape[0])
        for name, shape in SHAPES.items()
        for kind in KINDS
    }
    checkpoint.save(run_dir, step, partitions, run_state(step, SHAPES), ALONE)
    retain(run_dir, CheckpointConfig(keep_last=keep_last), ALONE)


def serve(run_dir: Path, step: int, keep_last: int, traced: bool) -> int:
    """Wait for the tracer, save, and answer. This runs in the forked process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    while traced and "TracerPid:\t0\n" in Path("/proc/self/status").read_text():
        time.sleep(0.002)
    time.sleep(0.05 if traced else 0)  # gives the tracer time to attach and stop this process once
    if "NO_FSYNC" in os.environ:
        os.fsync = lambda descriptor: None
    try:
        if keep_last == 0:
            remove_leftovers(run_dir)
            thin(run_dir, step, ThinDtype.fp32)
            return 0
        save(run_dir, step, keep_last)
    except CheckpointError as error:
        Path(f"{run_dir}.error").write_text(str(error))
        return 1
    return 0


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        run_dir, step, keep_last, traced = line.split()
        child = os.fork()
        if child == 0:
            try:
                os._exit(serve(Path(run_dir), int(step), int(keep_last), traced == "1"))
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(99)
        print(f"pid {child}", flush=True)
        _, status = os.waitpid(child, 0)
        print(f"exit {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    main()
