"""Where a run is sent, and what its nodes must have. Imports no torch; all is to be imported from `pretrain.config`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from pretrain.config.checks import check_positive
from pretrain.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class PreflightConfig:
    """What a node must have to train; checked by `launch/preflight.py` on every node before each start of a job."""

    enabled: bool = True
    check_timeout_s: int = 60
    """Longest that one check may take, the first import of torch included; all together: ten times that."""
    min_memory_gib: float = 2.0
    """Memory that is available."""
    min_run_dir_gib: float = 10.0
    """Free space for the run folder."""
    min_tmpdir_gib: float = 1.0
    """Free space in TMPDIR."""
    min_write_mib_per_second: float = 20.0
    """Writing and fsync of one file in the run folder."""
    max_clock_offset_s: float = 10.0
    """Between neighboring nodes."""
    min_network_mib_per_second: float = 100.0
    """Of one connection between neighboring nodes over cluster.network_interface."""

    def __post_init__(self) -> None:
        check_positive(self, "cluster.preflight", "check_timeout_s", "max_clock_offset_s")


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """Where `launch/submit.py` sends a run (Slurm)."""

    nodes: int = 1
    gpus_per_node: int = 8
    """GPUs, and so ranks, per node; 0: CPU ranks, `ranks_per_node` of them."""
    ranks_per_node: int | None = None
    """Processes per node; null: gpus_per_node. For CPU nodes only."""
    cpus_per_rank: int = 8
    """Cores, and so threads, of each rank."""
    memory_per_node_gib: int | None = None
    """null: all of the node."""
    exclusive: bool = True
    """Take whole nodes. false: only where the cluster hides other jobs' GPUs (ConstrainDevices=yes)."""
    time_limit: str = "24:00:00"
    """Slurm time, [days-]hours:minutes:seconds."""
    stop_before_end_s: int = 300
    """The run is asked to stop and save this long before the time limit (Slurm may be 60 s early)."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: list[str] = field(default_factory=list)
    """Nodes not to use."""
    job_name: str | None = None
    """null: the run folder's name."""
    setup: list[str] = field(default_factory=list)
    """Shell lines run on each node before training: modules, environment."""
    python: str | None = None
    """Python interpreter on the nodes; null: the one that submits."""
    network_interface: str | None = None
    """Interface of NCCL and gloo; null: their own choice."""
    chain_jobs: int = 1
    """Jobs, each after the one before: a job then ends at its time limit and the next goes on, instead of a requeue."""
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
        """Ranks of the job."""
        return self.nodes * (self.ranks_per_node or self.gpus_per_node)

    @property
    def time_limit_s(self) -> int:
        """The time limit in seconds."""
        days, _, clock = self.time_limit.rpartition("-")
        hours, minutes, seconds = (int(part) for part in clock.split(":"))
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
