"""Reads the variables that the launcher set for this process, which is possible before a process group exists."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

from pretrain.errors import ConfigError

FIRST_PORT = 20000
"""Ports of jobs begin here, below those that the kernel gives to connections; launch/templates/train.sbatch agrees."""


def adopt_launcher(environment: MutableMapping[str, str]) -> None:
    """Set RANK, WORLD_SIZE and so on from the variables of `srun`, where it started this process as one of several.

    `deepspeed` and `torchrun` set them by themselves. Raises ConfigError where a launcher gives no address at which the
    ranks can meet. Training scripts call this before anything asks for a rank.
    """
    if "RANK" in environment:
        return
    if int(environment.get("OMPI_COMM_WORLD_SIZE") or 1) > 1:
        raise ConfigError(
            "mpirun has started several processes, which do not know their ranks; start the ranks with deepspeed, "
            "torchrun or srun"
        )
    size = _srun_tasks(environment)
    if size == 1:
        return
    rank, local_rank = environment["SLURM_PROCID"], environment.get("SLURM_LOCALID")
    if local_rank is None or not int(rank) < size:
        raise ConfigError(
            f"SLURM_PROCID={rank} and SLURM_LOCALID={local_rank} do not describe one of {size} tasks of srun; pass on "
            "all variables that begin with SLURM_, or start the ranks with deepspeed or torchrun"
        )
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    n_hosts = int(environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES") or 1)
    if not hosts and n_hosts > 1 and "MASTER_ADDR" not in environment:
        raise ConfigError(
            f"srun has started tasks on {n_hosts} nodes, but SLURM_JOB_NODELIST is not set; set MASTER_ADDR to the "
            "first of them"
        )
    local_size = size if n_hosts == 1 else _tasks_of_node(environment)
    environment.update({"RANK": rank, "WORLD_SIZE": str(size), "LOCAL_RANK": local_rank})
    if local_size is not None:
        environment.setdefault("LOCAL_WORLD_SIZE", str(local_size))
    environment.setdefault("MASTER_ADDR", first_host(hosts) if hosts else "127.0.0.1")
    job, step = (int(environment.get(f"SLURM_{name}") or 0) for name in ("JOB_ID", "STEP_ID"))
    environment.setdefault("MASTER_PORT", str(FIRST_PORT + (job + step) % 10000))


def _srun_tasks(environment: MutableMapping[str, str]) -> int:
    """Number of tasks of the srun command that started this process; 1 where it was started in another way.

    The shell of `salloc` and the script of `sbatch` have the number of tasks of the job too, but no step. Where
    somebody passes on only a few variables, as into a container, there is no list of nodes either.
    """
    if not {"SLURM_PROCID", "SLURM_NTASKS"} <= environment.keys():
        return 1
    if "SLURM_STEP_ID" in environment:
        return int(environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"])
    is_task = "SLURM_LOCALID" in environment and "SLURM_JOB_NODELIST" not in environment
    return int(environment["SLURM_NTASKS"]) if is_task else 1


def _tasks_of_node(environment: MutableMapping[str, str]) -> int | None:
    """Number of tasks on this node, from a list such as `2(x3),1`; None where it is not known."""
    given = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or ""
    counts = [
        int(count)
        for count, _, repeats in re.findall(r"(\d+)(\(x(\d+)\))?", given)
        for _ in range(int(repeats or 1))
    ]
    node = int(environment.get("SLURM_NODEID") or 0)
    return counts[node] if node < len(counts) else None


def first_host(hosts: str) -> str:
    """The first host of a list as Slurm writes it, such as `gpu[03-05,9],login1`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0] if first else hosts)


def launched_rank() -> int:
    """This process's rank; 0 where no launcher set one."""
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int:
    """The number of ranks that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_local_size() -> int | None:
    """The number of ranks that the launcher started on this host; None where it did not set the variable."""
    given = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))
    return int(given) if given else None
