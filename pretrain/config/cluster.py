"""The configuration groups `cluster` and `cluster.preflight`: the Slurm job, and what its nodes must provide."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from pretrain.config.checks import check_positive
from pretrain.config.texts import PathText
from pretrain.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class PreflightConfig:
    """What a node must provide for training. `launch/preflight.py` checks it on every node each time a job starts."""

    enabled: bool = True
    """Whether the checks run; false starts training without them."""
    check_timeout_s: int = 60
    """Time limit of one check in seconds, including the first import of torch. All checks together may take ten
    times as long."""
    min_memory_gib: float = 2.0
    """Host memory that must be available on each node, in GiB."""
    min_run_dir_gib: float = 10.0
    """Free disk space that the run folder's file system must have, in GiB."""
    min_tmpdir_gib: float = 1.0
    """Free disk space that TMPDIR must have, in GiB."""
    min_write_mib_per_second: float = 20.0
    """Lowest accepted speed, in MiB/s, of writing and syncing one file in the run folder."""
    max_clock_offset_s: float = 10.0
    """Largest accepted difference between the clocks of neighboring nodes, in seconds."""
    min_network_mib_per_second: float = 100.0
    """Lowest accepted speed, in MiB/s, of one connection between neighboring nodes over cluster.network_interface."""

    def __post_init__(self) -> None:
        check_positive(self, "cluster.preflight", "check_timeout_s", "max_clock_offset_s")


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """The Slurm cluster to which `launch/submit.py` sends a run."""

    nodes: int = 1
    """Number of nodes."""
    gpus_per_node: int = 8
    """Number of GPUs per node, each with one rank; 0 trains on the CPUs with `ranks_per_node` ranks."""
    ranks_per_node: int | None = None
    """Number of ranks per node, for CPU nodes only; null means gpus_per_node."""
    cpus_per_rank: int = 8
    """Number of CPU cores, and of threads, per rank."""
    memory_per_node_gib: int | None = None
    """Host memory to reserve per node, in GiB; null means all memory of the node."""
    exclusive: bool = True
    """Reserve whole nodes. Use false only where the cluster hides other jobs' GPUs (ConstrainDevices=yes)."""
    time_limit: str = "24:00:00"
    """Time limit of the job as Slurm writes it, [days-]hours:minutes:seconds."""
    stop_before_end_s: int = 300
    """Seconds before the time limit at which the run is asked to save and stop. Slurm may ask up to 60 s early."""
    partition: str | None = None
    """Slurm partition; null means the cluster's default."""
    account: str | None = None
    """Slurm account that is charged; null means the user's default."""
    qos: str | None = None
    """Slurm quality of service; null means the default."""
    constraint: str | None = None
    """Features that the nodes must have, as for `sbatch --constraint`; null means none."""
    exclude: list[str] = field(default_factory=list)
    """Names of nodes that must not be used."""
    job_name: str | None = None
    """Name of the job; null means the run folder's name."""
    setup: list[str] = field(default_factory=list)
    """Shell lines to run on each node before training, such as `module load`."""
    python: PathText | None = None
    """Python interpreter on the nodes; null means the one that runs `launch/submit.py`."""
    network_interface: str | None = None
    """Network interface for NCCL and gloo; null lets them choose."""
    chain_jobs: int = 1
    """Number of jobs to submit, each of which starts after the previous one. With more than 1, a job that reaches its
    time limit is not requeued; the next job resumes the run."""
    preflight: PreflightConfig = field(default_factory=PreflightConfig)

    def __post_init__(self) -> None:
        check_positive(self, "cluster", "nodes", "cpus_per_rank", "stop_before_end_s", "chain_jobs")
        for name in ("ranks_per_node", "memory_per_node_gib"):
            if getattr(self, name) is not None:
                check_positive(self, "cluster", name)
        if self.gpus_per_node < 0 or (self.gpus_per_node == 0 and self.ranks_per_node is None):
            raise ConfigError(
                f"cluster.gpus_per_node={self.gpus_per_node} gives no ranks; for CPU nodes set cluster.ranks_per_node"
            )
        if self.gpus_per_node and self.ranks_per_node not in (None, self.gpus_per_node):
            raise ConfigError(
                f"cluster.ranks_per_node={self.ranks_per_node} differs from "
                f"cluster.gpus_per_node={self.gpus_per_node}; each GPU has one rank, so leave ranks_per_node out"
            )
        if not re.fullmatch(r"(\d+-)?\d+:[0-5]\d:[0-5]\d", self.time_limit):
            raise ConfigError(f"cluster.time_limit={self.time_limit!r} is not [days-]hours:minutes:seconds")
        if not self.stop_before_end_s < min(self.time_limit_s, 65536):  # Slurm keeps it in 16 bits
            raise ConfigError(
                f"cluster.stop_before_end_s={self.stop_before_end_s} must be less than "
                f"cluster.time_limit={self.time_limit} and than 65536"
            )

    @property
    def world_size(self) -> int:
        """Number of ranks of the job."""
        return self.nodes * (self.ranks_per_node or self.gpus_per_node)

    @property
    def time_limit_s(self) -> int:
        """The time limit in seconds."""
        days, _, clock = self.time_limit.rpartition("-")
        hours, minutes, seconds = (int(part) for part in clock.split(":"))
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
