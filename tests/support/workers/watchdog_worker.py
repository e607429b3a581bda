"""One watched rank that does steps with collectives, and fails in the way that the command line names.

Arguments: the run folder, the kind of failure, and the rank that fails. DeepSpeed is not used, so that the tests start
quickly.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
import torch.distributed as dist

from pretrain.config import WatchdogConfig
from pretrain.distributed import gather_objects, init_world
from pretrain.reliability.heartbeat import mark, touch
from pretrain.reliability.watchdog import Watchdog


def get_into(trouble: str) -> None:
    match trouble:
        case "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "holds the interpreter lock":
            while True:  # loops because the signal that requests the stacks ends a sleep
                ctypes.PyDLL(None).sleep(120)
        case "sleeps":
            time.sleep(120)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            ctypes.string_at(0)
        case "raises":
            mark("failed", last_words="RunError: the disk is gone")
            os._exit(1)
        case "is slow but gets on":
            for _ in range(14):  # seconds; longer than step_s
                time.sleep(1)
                touch()
        case "its watcher is killed":
            import psutil

            psutil.Process().children()[0].kill()


def main() -> None:
    run_dir, trouble, victim = sys.argv[1:]
    watchdog = Watchdog(run_dir, WatchdogConfig(startup_s=120, step_s=10, lost_s=20))
    world = init_world(120)
    watchdog.join(gather_objects(watchdog.address, world)[0])
    watchdog.attempt(7)
    for step in range(1, 201):
        mark("micro batch", step)
        if step == 5 and world.rank == int(victim):
            get_into(trouble)
            if trouble == "skips a collective":
                mark("update done", step)
                continue
        dist.all_reduce(torch.ones(1))
        mark("update done", step)
        watchdog.started()
        time.sleep(0.02)
    dist.barrier()
    watchdog.close()
    os._exit(0)


if __name__ == "__main__":
    main()
