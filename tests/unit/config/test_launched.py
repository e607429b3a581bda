"""Ranks as launchers state them: srun with one task per rank, and what only looks like it."""

from __future__ import annotations

import pytest

from pretrain.config.launched import adopt_launcher, first_host
from pretrain.errors import ConfigError

STEP = {
    "SLURM_JOB_ID": "712345",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_NODEID": "1",
    "SLURM_NNODES": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}
"""What srun sets for one of 16 tasks on two nodes."""
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def adopted(environment: dict[str, str]) -> tuple[str | None, ...]:
    """The variables of a rank after the launcher's are read."""
    given = dict(environment)
    adopt_launcher(given)
    return tuple(given.get(name) for name in NAMES)


def without(*names: str, **changed: str) -> dict[str, str]:
    return {name: value for name, value in (STEP | changed).items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        (STEP, ("11", "16", "3", "8", "gpu07", "22345")),
        (STEP | {"MASTER_ADDR": "ib0", "MASTER_PORT": "5"}, ("11", "16", "3", "8", "ib0", "5")),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "9,7"}, ("11", "16", "3", "7", "gpu07", "22345")),
        (without("SLURM_STEP_TASKS_PER_NODE"), ("11", "16", "3", None, "gpu07", "22345")),
        (STEP | {"SLURM_STEP_ID": "3"}, ("11", "16", "3", "8", "gpu07", "22348")),
        # variables that were set by hand, or passed into a container
        (
            {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"},
            ("1", "2", "1", "2", "127.0.0.1", "20007"),
        ),
    ],
)
def test_a_task_of_srun_is_a_rank(environment: dict[str, str], ranks: tuple[str | None, ...]) -> None:
    assert adopted(environment) == ranks


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "a[1-2]"},  # the shell of salloc
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
        # the script of sbatch
        without(
            "SLURM_STEP_ID",
            "SLURM_STEP_NUM_TASKS",
            "SLURM_STEP_NODELIST",
            SLURM_PROCID="0",
            SLURM_LOCALID="0",
        ),
        # the interactive step of salloc, and a step of one task
        STEP | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        STEP | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    ],
)
def test_what_srun_has_not_started_is_the_only_rank(environment: dict[str, str]) -> None:
    assert set(adopted(environment)) == {None}


def test_another_launcher_within_a_step_wins() -> None:
    """As the job of launch/submit.py: one task per node, which starts the node's ranks by itself."""
    assert adopted(STEP | {"RANK": "4", "WORLD_SIZE": "8"})[:3] == ("4", "8", None)


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        (without("SLURM_LOCALID"), "SLURM_LOCALID=None"),
        (STEP | {"SLURM_PROCID": "16"}, "SLURM_PROCID=16"),
        (without("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), "MASTER_ADDR"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}, "mpirun"),
    ],
)
def test_ranks_that_cannot_meet_are_refused(environment: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        adopted(environment)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[03-05,9],login1", "gpu03"),
        ("r[1-2]n[05,7]-ib,x", "r1n05-ib"),
        ("a-b[2]", "a-b2"),
    ],
)
def test_the_first_host_of_a_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first
