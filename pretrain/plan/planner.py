"""Memory, time and cost of a run before it is launched: pure functions of a configuration and a cluster.

Imports no torch, so that it answers quickly. Nothing here has been measured on GPUs of this project. Every figure is
`measured` (counted in real runs of this program), `fitted` (to published runs of others) or `projected` (neither).
docs/planning.md explains how to read a plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from pretrain.arithmetic import advised_interval_s, between_failures_s
from pretrain.config import AUTO, AttentionKernel, ModelConfig, Precision, Recompute, TrainConfig
from pretrain.config.engine import EngineConfig
from pretrain.errors import ConfigError
from pretrain.plan.hardware import GIB
from pretrain.plan.memory import ALL_WEIGHTS, Partitioning, Pass, Updates, memory_bytes
from pretrain.plan.time import (
    CALIBRATIONS,
    HOST_S_PER_BLOCK,
    Calibration,
    Cluster,
    StepTime,
    collectives,
    mfu_frac,
    step_time,
)

MEASURED, FITTED, PROJECTED = "measured", "fitted", "projected"
MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
"""Micro batches that a search tries."""
CALIBRATED = ("a100", "a100_40", "h100")
"""Devices of the published runs that the constants were fitted to; these runs had 8 to 64 devices."""
OTHER_STACKS = 0.15
"""Largest error of ln(step time) on runs that were not used for the fit: torchtitan on 8 to 128 GPUs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """Properties of a cluster apart from its devices: price, storage rate, restart time and host memory."""

    usd_per_gpu_hour: float | None
    """Price of one device per hour in USD; None if it is not known."""
    storage_bytes_per_s: float
    """Rate at which all ranks together write a checkpoint, in bytes per second."""
    restart_s: float
    """Seconds from a failure until training continues: detection, start, loading."""
    host_bytes_per_node: float
    """Host memory of a node, in bytes."""


_CHECKPOINTING = {
    Recompute.none: "",
    Recompute.selective: "selective checkpointing",
    Recompute.full: "checkpointing",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One way to run the model: a point of the search."""

    model: ModelConfig
    """The model, with this option's activation checkpointing."""
    engine: EngineConfig
    """The engine, with this option's ZeRO stage and offloads."""
    partitioning: Partitioning
    """How the state is partitioned over the ranks."""
    each: Pass
    """The input of each forward and backward pass."""
    accum_steps: int
    """Number of micro batches per step."""
    updates: Updates = ALL_WEIGHTS
    """What is trained."""

    @property
    def name(self) -> str:
        """The ZeRO stage, the micro batch, and the features that are enabled."""
        extra = [
            _CHECKPOINTING[self.model.activation_checkpointing],
            "offload optimizer" if self.engine.offload_optimizer else "",
            "offload parameters" if self.engine.offload_params else "",
            "on NVMe" if self.engine.nvme_path is not None else "",
            f"hpZ {self.engine.hpz_partition_ranks}" if self.engine.hpz_partition_ranks > 1 else "",
            "qwZ" if self.engine.quantized_weights else "",
            "qgZ" if self.engine.quantized_gradients else "",
        ]
        words = [f"ZeRO-{self.engine.zero_stage}", f"micro batch {self.each.sequences}", *filter(None, extra)]
        return ", ".join(words)

    @property
    def overrides(self) -> list[str]:
        """The configuration keys that select this option in launch/train.py."""
        engine = self.engine
        return [
            f"engine.zero_stage={engine.zero_stage}",
            f"micro_batch_sequences={self.each.sequences}",
            f"model.activation_checkpointing={self.model.activation_checkpointing.value}",
            f"engine.offload_optimizer={str(engine.offload_optimizer).lower()}",
            f"engine.offload_params={str(engine.offload_params).lower()}",
            f"engine.nvme_path={'null' if engine.nvme_path is None else engine.nvme_path}",
            f"engine.hpz_partition_ranks={engine.hpz_partition_ranks}",
            f"engine.quantized_weights={str(engine.quantized_weights).lower()}",
            f"engine.quantized_gradients={str(engine.quantized_gradients).lower()}",
        ]


class AssessedOption(NamedTuple):
    """An option with the memory and time that it takes."""

    option: Option
    """The option that was assessed."""
    device: dict[str, int]
    """Bytes of device memory per rank, by part."""
    host: dict[str, int]
    """Bytes of host memory per rank, by part."""
    step: StepTime
    """The time of one step."""
    problem: str | None
    """Why the option cannot run; None if it fits."""

    @property
    def device_total(self) -> int:
        """Bytes of device memory per rank, all parts together."""
        return sum(self.device.values())


def options(config: TrainConfig, cluster: Cluster, search: bool = True) -> Iterator[Option]:
    """All ways to run the configuration on the cluster, or without `search` only the configured one.

    ZeRO stage 0 is tried only in fp32, the only precision in which this program runs it, and offloaded parameters only
    with an offloaded optimizer.
    """
    n = cluster.n_ranks
    share, rest = divmod(config.global_batch_sequences, n)
    if rest:
        raise ConfigError(
            f"global_batch_sequences={config.global_batch_sequences} is not a multiple of {n} ranks; "
            f"try {max(1, share) * n}"
        )
    engine, model = config.engine, config.model
    by_document = config.data.document_masking or not config.causal
    masked = by_document and config.kernels.attention is AttentionKernel.sdpa
    zero_stages = [s for s in (0, 1, 2, 3) if s or engine.precision is Precision.fp32]
    offloads = [(False, False), (True, False), (True, True)]
    micros: tuple[int, ...] = MICRO_BATCHES
    recomputes = list(Recompute)
    if not search:
        zero_stages = [engine.zero_stage]
        if config.micro_batch_sequences != AUTO:
            micros = (config.micro_batch,)
        offloads, recomputes = (
            [(engine.offload_optimizer, engine.offload_params)],
            [model.activation_checkpointing],
        )
    for zero_stage in zero_stages:
        for micro in micros:
            if share % micro:
                continue
            for recompute in recomputes:
                for optimizer, params in offloads:
                    if (optimizer and zero_stage == 0) or (params and zero_stage != 3):
                        continue
                    yield Option(
                        model=replace(model, activation_checkpointing=recompute),
                        engine=_with(engine, zero_stage, optimizer, params),
                        partitioning=Partitioning(n_ranks=n, ranks_per_copy=n),
                        each=Pass(
                            sequences=micro,
                            sequence_length=config.data.sequence_length,
                            masked=masked,
                        ),
                        accum_steps=share // micro,
                        updates=updates_of(config),
                    )


def updates_of(config: TrainConfig) -> Updates:
    """What a run trains."""
    return Updates(lora=config.lora, ema=config.ema)


def _with(engine: EngineConfig, zero_stage: int, optimizer: bool, params: bool) -> EngineConfig:
    """The configured engine with another ZeRO stage and offload. Features that these do not allow are disabled."""
    return replace(
        engine,
        zero_stage=zero_stage,
        offload_optimizer=optimizer,
        offload_params=params,
        nvme_path=engine.nvme_path if zero_stage == 3 and optimizer else None,
        hpz_partition_ranks=engine.hpz_partition_ranks if zero_stage == 3 and not params else 1,
        quantized_weights=engine.quantized_weights and zero_stage == 3,
        quantized_gradients=engine.quantized_gradients and zero_stage == 3,
    )


def assess(
    option: Option,
    cluster: Cluster,
    site: Site,
    constants: Calibration | None = None,
    host_s_per_block: float | None = None,
) -> AssessedOption:
    """The memory and time that an option takes, and whether it fits the cluster."""
    device, host = memory_bytes(option.model, option.engine, option.partitioning, option.each, option.updates)
    step = step_time(
        option.model,
        option.engine,
        option.partitioning,
        cluster,
        option.each,
        option.accum_steps,
        constants=constants,
        host_s_per_block=host_s_per_block,
        updates=option.updates,
    )
    problem = None
    needs, has = sum(device.values()), cluster.gpu.memory_bytes
    on_node = sum(host.values()) * cluster.gpus_per_node
    if needs > has:
        problem = f"{needs / GIB:.1f} GiB do not fit the {has / GIB:.1f} GiB of the device"
    elif on_node > site.host_bytes_per_node:
        problem = f"{on_node / GIB:.0f} GiB of host memory do not fit the node's {site.host_bytes_per_node / GIB:.0f}"
    return AssessedOption(option, device, host, step, problem)


def rank_options(
    config: TrainConfig, cluster: Cluster, site: Site, search: bool = True
) -> list[AssessedOption]:
    """All options in order: those that fit, by step time and then by memory, followed by those that do not fit.

    Raises ConfigError if there is no option because the micro batch does not divide a rank's sequences.
    """
    assessed = [assess(option, cluster, site) for option in options(config, cluster, search)]
    if not assessed:
        raise ConfigError(
            f"micro_batch_sequences={config.micro_batch_sequences} does not divide the "
            f"{config.global_batch_sequences // cluster.n_ranks} sequences of each rank"
        )
    return sorted(assessed, key=lambda j: (j.problem is not None, j.step.total_s, j.device_total))


@dataclass(frozen=True, kw_only=True, slots=True)
class Goodput:
    """The time that saves and failures take from a run."""

    checkpoint_bytes: int
    """Size of a checkpoint in bytes."""
    stall_s: float
    """Seconds that training pauses for a save, which is the time of the copy to host memory."""
    write_s: float
    """Seconds to write a checkpoint while training continues."""
    mtbf_s: float
    """Mean time in seconds between failures of the whole job."""
    interval_s: float
    """Advised seconds between saves, at least as long as a write takes."""
    frac: float
    """Fraction of wall time spent in training. The rest is stalls, plus half an interval and a restart per failure."""


def goodput(config: TrainConfig, cluster: Cluster, site: Site, failures: float = 1.0) -> Goodput:
    """The expected goodput of a long run. `failures` multiplies the rate of failures."""
    updates = updates_of(config)
    saved = updates.saved_bytes * updates.trained(config.model)
    stall = saved / cluster.n_ranks / cluster.gpu.pcie_bytes_per_s
    mtbf = between_failures_s(cluster.n_ranks, config.checkpoint.mtbf_hours) / failures
    write = saved / site.storage_bytes_per_s
    interval = max(advised_interval_s(stall, mtbf), write)
    lost = stall / interval + (interval / 2 + site.restart_s) / mtbf
    return Goodput(
        checkpoint_bytes=saved,
        stall_s=stall,
        write_s=write,
        mtbf_s=mtbf,
        interval_s=interval,
        frac=max(0.0, 1 - lost),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A run on a cluster with its assessed options."""

    config: TrainConfig
    """The configuration of the run."""
    cluster: Cluster
    """The devices and their network."""
    site: Site
    """The other properties of the cluster."""
    ranked: list[AssessedOption]
    """All options, with the best one first."""
    goodput: Goodput
    """The time that saves and failures take."""

    @property
    def best(self) -> AssessedOption:
        """The fastest option that fits."""
        return self.ranked[0]

    @property
    def tokens(self) -> int:
        """Number of tokens of the whole run."""
        return self.config.n_steps * self.best.step.tokens

    @property
    def days(self) -> float:
        """Wall time of all steps in days, including saves and failures."""
        return self.config.n_steps * self.best.step.total_s / self.goodput.frac / 86400

    @property
    def usd(self) -> float | None:
        """Price of the run in USD; None if no price is known."""
        if self.site.usd_per_gpu_hour is None:
            return None
        return self.days * 24 * self.cluster.n_ranks * self.site.usd_per_gpu_hour


def make_plan(config: TrainConfig, cluster: Cluster, site: Site, search: bool = True) -> Plan:
    """Assess all options and choose the best. Raises ConfigError if none fits, or if the job would fail too often."""
    ranked = rank_options(config, cluster, site, search)
    if ranked[0].problem is not None:
        least = min(ranked, key=lambda j: j.device_total)
        raise ConfigError(
            f"none of {len(ranked)} options fits {cluster.n_ranks} x {cluster.gpu.name}: {least.option.name}, which "
            f"takes the least, is left out because {least.problem}; use more or larger devices, or shorter sequences"
        )
    found = goodput(config, cluster, site)
    if found.frac <= 0:
        raise ConfigError(
            f"the job would fail every {found.mtbf_s / 3600:.2f} h and lose more than it gains; use fewer ranks, "
            "faster storage or a shorter cluster.restart_s"
        )
    return Plan(config=config, cluster=cluster, site=site, ranked=ranked, goodput=found)


def uncertainties(plan: Plan) -> list[tuple[str, float]]:
    """The unknowns of a plan, largest first, each with the fraction by which time or cost grows in the worst case."""
    constants = CALIBRATIONS[plan.cluster.gpu.calibrated_as]
    option, total = plan.best.option, plan.best.step.total_s

    def slower(worse: Calibration, cluster: Cluster = plan.cluster, host: float | None = None) -> float:
        return assess(option, cluster, plan.site, worse, host).step.total_s / total - 1

    halved = replace(plan.cluster, nic_bits_per_s=plan.cluster.nic_bits_per_s / 2)
    hidden = replace(constants, exposed_frac=1.0)
    twice = 2 * HOST_S_PER_BLOCK[option.engine.zero_stage]
    often = goodput(plan.config, plan.cluster, plan.site, failures=3)
    unlike = OTHER_STACKS if plan.cluster.gpu.name in CALIBRATED else 2 * OTHER_STACKS
    found = [
        ("this program's kernels against those of the published runs", math.exp(unlike) - 1),
        ("the network gives half of what was fitted", slower(constants, halved)),
        ("no communication hides behind computing", slower(hidden)),
        ("the host takes twice as long for each block", slower(constants, host=twice)),
        ("failures are three times as many", plan.goodput.frac / often.frac - 1 if often.frac else math.inf),
    ]
    if plan.site.usd_per_gpu_hour == plan.cluster.gpu.usd_per_hour is not None:
        found.append(("the price, which for one H100 was 2.69 to 12.29 USD (2026)", 12.29 / 3.99 - 1))
    return sorted(found, key=lambda item: -item[1])


def data_bytes_per_s(plan: Plan) -> float:
    """Bytes per second that the whole job reads from its corpus."""
    return token_bytes(plan.config.model) * plan.best.step.tokens_per_second


def token_bytes(model: ModelConfig) -> int:
    """Bytes of a token on disk: 2 for a vocabulary of up to 65,536 entries, otherwise 4."""
    assert model.vocab_size is not None
    return 2 if model.vocab_size <= 65_536 else 4


def checkpoints_kept(config: TrainConfig) -> int:
    """Largest number of checkpoints on disk at the end of the run, including one that is being written."""
    policy = config.checkpoint
    permanent = config.n_steps // policy.keep_every_steps if policy.keep_every_steps else 0
    return policy.keep_last + policy.keep_best + permanent + 1


def sent_bytes(assessed: AssessedOption, cluster: Cluster) -> list[tuple[str, float, float]]:
    """For each collective: its kind and phase, the bytes that a rank sends per step, and those that enter a node."""
    option = assessed.option
    micro, once = collectives(option.model, option.engine, option.partitioning, cluster, option.updates)
    return [
        (f"{c.kind}, {c.when}", times * c.sent_bytes, times * c.between_nodes_bytes)
        for group, times in ((micro, option.accum_steps), (once, 1))
        for c in group
    ]


def mfu(assessed: AssessedOption, cluster: Cluster) -> float:
    """Model FLOP utilization of an option, 0 to 1."""
    return mfu_frac(assessed.step, cluster, assessed.option.engine.precision)
