"""Measures the denominator of MFU: the best rate of bf16 matrix products per rank while all ranks compute them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from benchmarks.harness.worker import device_name, read_job
from pretrain.config import Precision, TrainConfig, validate
from pretrain.distributed import init_world, shutdown_world
from pretrain.engine.peak import measure_matmul_flops

SECONDS = 4.0


def main() -> None:
    job, folder = read_job()
    config = validate(TrainConfig, job.config)
    world = init_world(config.engine.timeout_s)
    dtype = torch.bfloat16 if config.engine.precision is Precision.bf16 else torch.float32
    dist.barrier()
    found = {
        "flops_per_second": measure_matmul_flops(world.device, dtype, SECONDS),
        "device": device_name(world.device),
    }
    (folder / f"rank-{world.rank}.json").write_text(json.dumps(found))
    shutdown_world()


if __name__ == "__main__":
    main()
