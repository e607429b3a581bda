"""Plan a run: `python launch/plan.py model=7b cluster.nodes=16 cluster.gpu=h100 total_tokens=10_000_000_000`

Prints the memory per rank by part, step time, MFU, days, cost, checkpoints, goodput, and the engine options that fit,
the fastest first. All keys of launch/train.py (run_dir, data.manifest and init_from are optional) and of the cluster
are accepted.
Values that are not given are chosen: the global batch (about 4 million tokens), the vocabulary (32,000), and with
search=true the ZeRO stage, micro-batch, activation checkpointing and offload. search=false plans only the given
configuration. json=true adds one line of JSON at the end; table=scaling prints the table of docs/scaling.md instead,
and table=recipes that of docs/recipes.md. ladder=DIR predicts the loss from your own runs (launch/ladder.py).
docs/planning.md explains the output.
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

from pretrain.config import ClusterConfig, DataConfig, Objective, TrainConfig, run_command
from pretrain.config.checks import check_positive
from pretrain.config.texts import PathText
from pretrain.errors import ConfigError
from pretrain.model.precision import resolve_precision
from pretrain.plan.hardware import GIB, known_gpu
from pretrain.plan.ladder import read_fit
from pretrain.plan.loss import ladder_parameters
from pretrain.plan.planner import Site, make_plan
from pretrain.plan.recipes import recipes_table
from pretrain.plan.report import plan_lines, plan_values
from pretrain.plan.scaling import scaling_table
from pretrain.plan.time import Cluster

CHOSEN_BATCH_TOKENS = 4_000_000  # the global batch of Llama 2 (Touvron et al., 2023)
ASSUMED_VOCABULARY = 32_000  # the vocabulary of Llama 2
TRAINED_MICRO_BATCH = next(f.default for f in fields(TrainConfig) if f.name == "micro_batch_sequences")


class Table(Enum):
    plan = "plan"
    scaling = "scaling"
    recipes = "recipes"


@dataclass(kw_only=True, slots=True)
class PlanDataConfig(DataConfig):
    """The data that the planned run would read."""

    tokens: int | None = None
    """Length of the run in tokens; an alias of total_tokens."""

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        if self.tokens is not None:
            check_positive(self, "data", "tokens")


@dataclass(kw_only=True, slots=True)
class PlanClusterConfig(ClusterConfig):
    """The cluster to plan for, which need not exist."""

    gpu: str = "h100"
    """Name of the GPU in pretrain/plan/hardware.py."""
    nic_gbit_per_second: float | None = None
    """Network bandwidth per GPU in one direction, in Gbit/s; null means that of the GPU maker's own systems."""
    usd_per_gpu_hour: float | None = None
    """Price of a GPU in US dollars per hour; null means a list price, where the table of GPUs has one."""
    storage_gib_per_second: float = 10.0
    """Rate at which all ranks together write a checkpoint, in GiB/s."""
    restart_s: float = 600.0
    """Seconds from a failure until training continues."""

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

    run_dir: PathText = "unused"
    """Not used; nothing is written there."""
    global_batch_sequences: int | None = None  # type: ignore[assignment]
    """Sequences per optimizer update; null means about 4 million tokens, and at least one sequence per rank."""
    micro_batch_sequences: int | str | None = None  # type: ignore[assignment]
    """Sequences per rank and forward pass, with search=false; null means the default of launch/train.py, and auto tries
    all sizes."""
    data: PlanDataConfig = MISSING
    cluster: PlanClusterConfig = MISSING
    search: bool = True
    """Try all combinations of ZeRO stage, micro-batch, activation checkpointing and offload; false plans only the
    configured one."""
    ladder: PathText | None = None
    """Folder of a ladder (launch/ladder.py), or its fit.json, which predicts the loss. Without global_batch_sequences
    the batch follows the ladder, and without model.vocab_size the vocabulary."""
    json: bool = False
    """Print the plan as JSON on the last line of stdout."""
    table: Table = Table.plan
    """What to print: the plan of this run, or with `scaling` or `recipes` the table of docs/scaling.md or
    docs/recipes.md, which depends on no other key."""

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
        if self.objective is Objective.classify:
            raise ConfigError(
                "objective=classify is not known to the planner; leave it out: a plan of the same model with "
                "objective=causal, whose head is larger, is an upper bound of memory and time"
            )
        if self.lora.r and self.init_from is None:
            self.init_from = "unused"
        if data.manifest is None and not data.sources:
            data.manifest = "unused"
        if self.table is not Table.plan and data.tokens is None:
            data.tokens = 1
        if data.tokens is not None:
            if self.total_tokens not in (None, data.tokens) or self.total_steps is not None:
                raise ConfigError(
                    f"data.tokens={data.tokens}, total_tokens={self.total_tokens} and total_steps={self.total_steps}: "
                    "give one of them"
                )
            self.total_tokens = data.tokens
        if self.total_epochs is not None and self.total_tokens is None and self.total_steps is None:
            self.total_tokens, self.total_epochs = _tokens_of_epochs(data, self.total_epochs), None
        if self.total_tokens is None and self.total_steps is None:
            raise ConfigError("the length of the run is missing; give total_tokens=N")
        fit = None if self.ladder is None else read_fit(self.ladder)
        if self.model.vocab_size is None:
            self.model.vocab_size = ASSUMED_VOCABULARY if fit is None else fit.vocab_size
        if self.global_batch_sequences is None and fit is not None:
            wanted = fit.batch_tokens.at(ladder_parameters(self.model)) / data.sequence_length
            self.global_batch_sequences = ranks * max(1, round(wanted / ranks))
        elif self.global_batch_sequences is None:
            doublings = math.log2(max(1.0, CHOSEN_BATCH_TOKENS / data.sequence_length / ranks))
            self.global_batch_sequences = ranks * 2 ** int(doublings)
        if self.search:  # the search tries all sizes, so this one only has to be valid
            self.micro_batch_sequences = 1
        elif self.micro_batch_sequences is None:
            self.micro_batch_sequences = TRAINED_MICRO_BATCH
        TrainConfig.__post_init__(self)
        self.engine.check_ranks(ranks, self.cluster.gpus_per_node)


def _tokens_of_epochs(data: DataConfig, n_epochs: int) -> int:
    """Number of tokens that `n_epochs` epochs of the corpora have, padding included. Raises ConfigError without any."""
    from pretrain.corpus.manifest import load_manifest
    from pretrain.data.lanes import sequences_of
    from pretrain.data.order import SourceSize

    if data.manifest == "unused":
        raise ConfigError(
            f"total_epochs={n_epochs} needs the corpora; give data.manifest, or data.tokens=N instead"
        )
    sizes = [SourceSize.of(load_manifest(source.manifest)) for source in data.corpora()]
    return n_epochs * data.sequence_length * sum(sequences_of(size, data.sequence_length) for size in sizes)


def main(config: PlanConfig) -> None:
    """Plan the run and print the plan."""
    if config.table is Table.scaling:
        print(scaling_table())
        return
    if config.table is Table.recipes:
        print(recipes_table())
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
    fit = None if config.ladder is None else read_fit(config.ladder)
    plan = make_plan(config, cluster, site, config.search)
    print("\n".join(plan_lines(plan, fit)))
    if config.json:
        print(json.dumps(plan_values(plan, fit)))


if __name__ == "__main__":
    run_command(PlanConfig, main, config_name="plan", doc=__doc__)
