"""The device of this process: a GPU where there is one, otherwise the CPU. DS_ACCELERATOR=cpu|cuda overrides this.

All code that depends on the device asks this module, and nothing else calls `torch.cuda.is_available()`, because a run
on a machine with GPUs may be meant for the CPU. A GPU that torch cannot use is an error: silently training on the CPU
instead would take weeks.

`device_type` needs only torch, because the benchmark's peers also call it, in environments of their own.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from glob import glob
from typing import NamedTuple

import torch

ASKED = os.environ.get("DS_ACCELERATOR")
"""The device that the user asked for. It is read at import, because the engine later sets this variable for
DeepSpeed."""
ON_THE_CPU = "to train on the CPU on purpose, set DS_ACCELERATOR=cpu"
HIDDEN = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide all GPUs from a process; a user or Slurm sets them."""
OLDEST_DRIVER = {12: 525, 13: 580}
"""Oldest driver that runs each major version of CUDA (NVIDIA, CUDA Compatibility, table 1)."""


def device_type() -> str:
    """`cuda` or `cpu`."""
    return "cuda" if ASKED != "cpu" and torch.cuda.is_available() else "cpu"


def own_device() -> torch.device:
    """The device of a single-rank process. Raises ConfigError where the host has a GPU that torch cannot use."""
    from pretrain.errors import ConfigError

    problem = device_problem()
    if problem is not None:
        raise ConfigError(problem)
    return torch.device(device_type())


# ---- ranks -----------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where one rank computes."""

    host: str
    device: str
    """`cpu`, or `cuda:N`, where N is the index of the GPU in this process."""
    gpu: str | None = None
    """UUID of the GPU, which is the same in every process that sees it."""
    problem: str | None = None
    """Why the rank cannot compute there and what to do about it; None where it can."""


def rank_place() -> Place:
    """Where this rank computes: on its host's GPU number LOCAL_RANK, or on the only GPU that it can see."""
    from pretrain.config.launched import launched_local_size

    host, problem = socket.gethostname(), device_problem()
    if problem is not None or device_type() == "cpu":
        return Place(host, "cpu", problem=problem)
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", "0")), launched_local_size() or 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = f"CUDA_VISIBLE_DEVICES={visible}" if visible else "CUDA_VISIBLE_DEVICES is not set"
    count = torch.cuda.device_count()
    # `srun --gpus-per-task=1` shows each task only its own GPU, which has index 0 there.
    index = 0 if count == 1 else local_rank
    if visible and "MIG-" in visible and local_size > 1:
        problem = (
            f"{host} has {local_size} ranks on MIG slices of GPUs ({seen}), between which NCCL cannot communicate; "
            "start one rank (python launch/train.py ...), or use whole GPUs"
        )
    elif index >= count:
        problem = (
            f"{host} has {max(local_size, local_rank + 1)} ranks, which see only {count} GPUs ({seen}); "
            f"start at most {count} ranks there (deepspeed --num_gpus {count}); {ON_THE_CPU}"
        )
    if problem is not None:
        return Place(host, "cpu", problem=problem)
    return Place(host, f"cuda:{index}", str(torch.cuda.get_device_properties(index).uuid))


def joint_problem(places: list[Place]) -> str | None:
    """Why the ranks cannot train together on these devices; None where they can. `places` are in rank order."""
    owners: dict[tuple[str, str], int] = {}
    for rank, place in enumerate(places):
        if place.problem is not None:
            return place.problem
        if place.device[:3] != places[0].device[:3]:
            return (
                f"rank 0 on {places[0].host} computes on {places[0].device} and rank {rank} on {place.host} on "
                f"{place.device}; all ranks must use GPUs or all must use the CPU: {ON_THE_CPU}"
            )
        if place.gpu is None:
            continue
        first = owners.setdefault((place.host, place.gpu), rank)
        if first != rank:
            return (
                f"ranks {first} and {rank} on {place.host} share one GPU ({place.gpu}), and NCCL needs one per rank; "
                f"start at most as many ranks per host as it has GPUs; {ON_THE_CPU}"
            )
    return None


# ---- a GPU that cannot be used ---------------------------------------------------------------------------------------


def device_problem() -> str | None:
    """Why this process cannot use its intended device, and what to do about it; None where it can."""
    if ASKED not in (None, "cpu", "cuda"):
        return f"DS_ACCELERATOR={ASKED} is not supported; allowed: cpu, cuda"
    if ASKED == "cpu" or torch.cuda.is_available():
        return None
    is_there, driver = _find_gpu()
    if os.environ.get("CUDA_VISIBLE_DEVICES") in HIDDEN or not is_there:
        return "DS_ACCELERATOR=cuda, but this process sees no NVIDIA GPU" if ASKED == "cuda" else None
    return (
        f"{socket.gethostname()} has an NVIDIA GPU, but torch cannot use it: {_reason(driver)}; {ON_THE_CPU}"
    )


def _find_gpu() -> tuple[bool, int | None]:
    """Whether this host has an NVIDIA GPU, and the major version of its driver, found without torch."""
    there = bool(glob("/dev/nvidia[0-9]*"))
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return there, None
    version = re.match(r"\d+", listed.stdout)
    if listed.returncode == 0 and version:
        return True, int(version[0])
    # The device files may exist in a job to which the scheduler has given no GPU.
    return there and "no devices" not in listed.stdout.lower(), None


def _reason(driver: int | None) -> str:
    """Why torch cannot use the GPU, and what to do about it."""
    cuda, version = torch.version.cuda, torch.__version__
    if cuda is None:
        remedy = "PRETRAIN_TORCH=cuda bash launch/setup_env.sh"
        return f"torch {version} is a CPU build; install the CUDA build ({remedy})"
    oldest = OLDEST_DRIVER.get(int(cuda.split(".")[0]), 0)
    if driver is not None and driver < oldest:
        other = ""
        if oldest > OLDEST_DRIVER[12] <= driver:
            other = ", or install torch for CUDA 12.6 (PRETRAIN_TORCH=cuda bash launch/setup_env.sh)"
        return (
            f"its driver has version {driver}, and torch {version} for CUDA {cuda} needs {oldest} or newer; update "
            f"the driver{other}"
        )
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        said = " ".join(str(error).split("\n")[0].split()).rstrip(".")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return f"torch says: {said}" + (f" (CUDA_VISIBLE_DEVICES={visible})" if visible else "")
    return "torch gives no reason"
