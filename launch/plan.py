"""What a run would take: `python launch/plan.py model=7b cluster.nodes=16 cluster.gpu=h100 data.tokens=10_000_000_000`

Takes every key of launch/train.py (run_dir and data.manifest may be left out) and of the cluster, and prints memory per
rank by part, step time, MFU, days, cost, checkpoints, goodput, and the engine options that fit, the fastest first. What
is not given is chosen: the global batch (about 4 million tokens), the vocabulary (32,000), and with search=true ZeRO
stage, micro batch, activation checkpointing and offload. search=false plans just what is configured. json=true ends
with one line of JSON; table=scaling prints the table of docs/scaling.md. docs/planning.md says how to read it.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.command import begin

begin(__name__)

from omegaconf import MISSING

from pretrain.config import ClusterConfig, DataConfig, TrainConfig, run_command
from pretrain.config.checks import check_positive
from pretrain.errors import ConfigError
from pretrain.model.precision import resolve_precision
from pretrain.plan.hardware import GIB, known_gpu
from pretrain.plan.planner import Site, make_plan
from pretrain.plan.report import plan_lines, plan_values
from pretrain.plan.scaling import scaling_table
from pretrain.plan.time import Cluster

CHOSEN_BATCH_TOKENS = 4_000_000  # Llama 2 (Touvron et al., 2023)
ASSUMED_VOCABULARY = 32_000  # of the same
TRAINED_MICRO_BATCH = next(f.default for f in fields(TrainConfig) if f.name == "micro_batch_sequences")


class Table(Enum):
    plan = "plan"
    scaling = "scaling"


@dataclass(kw_only=True, slots=True)
class PlanDataConfig(DataConfig):
    """What would be read."""

    tokens: int | None = None
    """Length of the run in tokens: another name for total_tokens."""

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        if self.tokens is not None:
            check_positive(self, "data", "tokens")


@dataclass(kw_only=True, slots=True)
class PlanClusterConfig(ClusterConfig):
    """A cluster that may not exist."""

    gpu: str = "h100"
    """Device by its name in pretrain/plan/hardware.py."""
    nic_gbit_per_second: float | None = None
    """Network of each GPU, one direction; null: as the maker's own system has it."""
    usd_per_gpu_hour: float | None = None
    """null: a list price, where the table has one."""
    storage_gib_per_second: float = 10.0
    """That all ranks together write a checkpoint with."""
    restart_s: float = 600.0
    """From a failure until training goes on."""

    def __post_init__(self) -> None:
        ClusterConfig.__post_init__(self)
        check_positive(self, "cluster", "storage_gib_per_second", "restart_s")
        for name in ("nic_gbit_per_second", "usd_per_gpu_hour"):
            if getattr(self, name) is not None:
                check_positive(self, "cluster", name)
        known_gpu(self.gpu)
        if self.gpus_per_node == 0:
            raise ConfigError("cluster.gpus_per_node=0: the planner knows GPUs only; give 1 or more")


@dataclass(kw_only=True, slots=True)
class PlanConfig(TrainConfig):
    """A training run that is planned."""

    run_dir: str = "unused"
    """Nothing is written there."""
    global_batch_sequences: int | None = None  # type: ignore[assignment]
    """Sequences per optimizer update; null: about 4 million tokens, and at least one sequence per rank."""
    micro_batch_sequences: int | str | None = None  # type: ignore[assignment]
    """With search=false: sequences per rank and forward pass; null: as launch/train.py has it; auto: all are tried."""
    data: PlanDataConfig = MISSING
    cluster: PlanClusterConfig = MISSING
    search: bool = True
    """Try all ZeRO stages, micro batches, activation checkpointing and offload; false: what is configured."""
    json: bool = False
    """End with one line of JSON."""
    table: Table = Table.plan
    """scaling: the table of docs/scaling.md instead, which depends on no other key."""

    def __post_init__(self) -> None:
        if MISSING in (self.data, self.cluster, self.model, self.engine):
            return
        data, ranks = self.data, self.cluster.world_size
        has_bf16 = known_gpu(self.cluster.gpu).bf16_flops is not None
        self.engine = replace(self.engine, precision=resolve_precision(self.engine.precision, has_bf16))
        if self.engine.sequence_parallel_ranks > 1:
            raise ConfigError(
                f"engine.sequence_parallel_ranks={self.engine.sequence_parallel_ranks} is not known to the planner; "
                "leave it out"
            )
        if data.manifest is None and not data.sources:
            data.manifest = "unused"
        if self.table is Table.scaling and data.tokens is None:
            data.tokens = 1
        if data.tokens is not None:
            if self.total_tokens not in (None, data.tokens) or self.total_steps is not None:
                raise ConfigError(
                    f"data.tokens={data.tokens}, total_tokens={self.total_tokens} and total_steps={self.total_steps}: "
                    "give one of them"
                )
            self.total_tokens = data.tokens
        if self.total_tokens is None and self.total_steps is None:
            raise ConfigError("the length of the run is missing; give data.tokens=N")
        if self.model.vocab_size is None:
            self.model.vocab_size = ASSUMED_VOCABULARY
        if self.global_batch_sequences is None:
            doublings = math.log2(max(1.0, CHOSEN_BATCH_TOKENS / data.sequence_length / ranks))
            self.global_batch_sequences = ranks * 2 ** int(doublings)
        if self.search:  # all sizes are tried
            self.micro_batch_sequences = 1
        elif self.micro_batch_sequences is None:
            self.micro_batch_sequences = TRAINED_MICRO_BATCH
        TrainConfig.__post_init__(self)
        self.engine.check_ranks(ranks, self.cluster.gpus_per_node)


def main(config: PlanConfig) -> None:
    """Plan, and print."""
    if config.table is Table.scaling:
        print(scaling_table())
        return
    given = config.cluster
    gpu = known_gpu(given.gpu)
    nic = given.nic_gbit_per_second
    cluster = Cluster(
        gpu=gpu,
        nodes=given.nodes,
        gpus_per_node=given.gpus_per_node,
        nic_bits_per_s=gpu.nic_bits_per_s if nic is None else nic * 1e9,
    )
    memory = given.memory_per_node_gib
    site = Site(
        usd_per_gpu_hour=given.usd_per_gpu_hour or gpu.usd_per_hour,
        storage_bytes_per_s=given.storage_gib_per_second * GIB,
        restart_s=given.restart_s,
        host_bytes_per_node=gpu.host_bytes * given.gpus_per_node if memory is None else memory * GIB,
    )
    plan = make_plan(config, cluster, site, config.search)
    print("\n".join(plan_lines(plan)))
    if config.json:
        print(json.dumps(plan_values(plan)))


if __name__ == "__main__":
    run_command(PlanConfig, main, config_name="plan", doc=__doc__)
