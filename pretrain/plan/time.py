"""How long a step takes: bytes on the wire and seconds by part, as pure functions. Imports no torch.

Volumes are those that DeepSpeed 0.19 moves, counted in real runs (tests/test_planner.py). Seconds come from peaks of
data sheets and the constants in CALIBRATIONS, which benchmarks/fit_planner.py fits on published runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.arithmetic import (
    attention_flops_per_token,
    count_parameters,
    flops_per_token,
    matmul_flops_per_token,
)
from pretrain.config import ModelConfig, Precision, Recompute
from pretrain.config.engine import EngineConfig
from pretrain.errors import ConfigError
from pretrain.plan.hardware import Gpu
from pretrain.plan.memory import (
    Pass,
    Sharding,
    element_bytes,
    kept_elements,
    persistent_elements,
    saved_bytes_per_token,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What no data sheet says. Fitted by benchmarks/fit_planner.py."""

    matmul_frac: float
    """Of the peak that matrix products reach."""
    attention_frac: float
    """Of the peak that attention reaches, its operations counted as if all tokens saw each other."""
    passes: float
    """How often what a block keeps for its backward pass goes through device memory, forward and backward."""
    exposed_frac: float
    """Of communication that could hide behind computing, how much does not."""
    link_frac: float
    """Of the link's rate that collectives within a node reach."""
    network_frac: float
    """Of the network's rate that collectives between nodes reach."""


CALIBRATIONS: dict[str, Calibration] = {
    gpu: Calibration(
        matmul_frac=matmul_frac,
        attention_frac=attention_frac,
        passes=14.54,
        exposed_frac=0.801,
        link_frac=0.471,
        network_frac=0.419,
    )
    for gpu, matmul_frac, attention_frac in (("a100", 0.933, 0.553), ("h100", 0.847, 0.317))
}
HOP_S = 1e-5
"""Assumed: latency of a collective per node of its ring. Runs of up to 8 nodes are too few to fit it."""
HBM_FRAC = 0.8
"""Assumed: of the memory bandwidth that an optimizer's kernel reaches."""
HOST_BYTES_PER_S = 30e9
"""Of one rank that updates on the host: AdamW moved 28 bytes for each of 57.7 million values in 54 ms here."""
NVME_BYTES_PER_S = 1e9
"""Assumed: of one rank, reading or writing, where the ranks of a host share a disk."""
HOST_S_PER_BLOCK = {0: 4.8e-3, 1: 4.8e-3, 2: 4.8e-3, 3: 14.8e-3}
"""By stage: what the host's main thread takes for one block and micro batch, forward and backward: launching operations
and, under stage 3, DeepSpeed's hooks. Its CPU time in 2-rank runs here, 12 blocks less 4, where computing is next to
nothing. A device that is done sooner waits. Assumed to be the same beside a GPU."""
MASK_FACTOR = 2.0
"""Assumed: with a mask, attention does not skip what comes later, and so computes twice as much."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Ranks and what joins them."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    nic_bits_per_s: float
    """Per device, one direction."""

    @property
    def n_ranks(self) -> int:
        """One per device."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, kw_only=True, slots=True)
class Collective:
    """Collectives of one kind within one micro batch, or within one step."""

    kind: str
    """all-gather, reduce-scatter or all-reduce."""
    when: str
    """forward, backward or update."""
    payload_bytes: float
    """Of the whole tensors, before the (N-1)/N of a ring."""
    calls: int
    n_ranks: int
    """Of the group."""
    ranks_per_node: int
    """Of the group on one node."""

    @property
    def nodes(self) -> int:
        """That the group spans."""
        return -(-self.n_ranks // self.ranks_per_node)

    @property
    def rounds(self) -> int:
        """Times that the payload goes around: an all-reduce is a reduce-scatter and an all-gather."""
        return 2 if self.kind == "all-reduce" else 1

    @property
    def sent_bytes(self) -> float:
        """By each rank."""
        return self.rounds * self.payload_bytes * (self.n_ranks - 1) / self.n_ranks

    @property
    def between_nodes_bytes(self) -> float:
        """Into each node: once per round, all but its own part."""
        return self.rounds * self.payload_bytes * (self.nodes - 1) / self.nodes


def collectives(
    model: ModelConfig, engine: EngineConfig, sharding: Sharding, cluster: Cluster
) -> tuple[list[Collective], list[Collective]]:
    """Those of each micro batch, and those once per step.

    Stages 0 and 1 all-reduce gradients once per step, stage 2 in every micro batch (DeepSpeed reduces its buckets to
    all ranks, not to their owners). Stage 3 gathers parameters for the forward pass and, but for what it kept, again
    for the backward pass, and scatters the sum of the gradients. Stages 1 and 2 gather parameters after the update.
    """
    width, zero_stage = element_bytes(engine), engine.zero_stage
    total, n = count_parameters(model), sharding.n_shards
    everywhere = (cluster.n_ranks, min(cluster.gpus_per_node, cluster.n_ranks))
    buckets = max(1, -(-total // engine.reduce_bucket_elements))

    def make(kind: str, when: str, elements: float, calls: int, group: tuple[int, int]) -> Collective:
        return Collective(
            kind=kind,
            when=when,
            payload_bytes=width * elements,
            calls=calls,
            n_ranks=group[0],
            ranks_per_node=group[1],
        )

    if zero_stage < 3:
        reduced = make("all-reduce", "backward" if zero_stage == 2 else "update", total, buckets, everywhere)
        gathered = [make("all-gather", "update", total, 1, everywhere)] if zero_stage else []
        return ([reduced], gathered) if zero_stage == 2 else ([], [reduced, *gathered])
    shards = (n, min(cluster.gpus_per_node, n))
    small, kept = persistent_elements(model, engine), kept_elements(model, engine)
    forward, backward = total - small, total - small - kept
    blocks = model.n_layers + 2
    near = min(engine.hpz_partition_ranks, n)
    again = (near, near) if near > 1 else shards
    each = [
        make("all-gather", "forward", forward / (2 if engine.quantized_weights else 1), blocks, shards),
        make("all-gather", "backward", backward, blocks if backward else 0, again),
        make("reduce-scatter", "backward", total / (4 if engine.quantized_gradients else 1), buckets, shards),
    ]
    once = [make("all-gather", "update", small, 1, shards)] if small else []
    copies = cluster.n_ranks // n
    if copies > 1:  # hybrid sharding: the copies' gradient shards are summed, rank by rank
        per_node = max(1, cluster.gpus_per_node // n)
        calls = max(1, -(-total // n // engine.reduce_bucket_elements))
        once.append(make("all-reduce", "update", total / n, calls, (copies, per_node)))
    return [c for c in each if c.payload_bytes], once


def collective_s(collective: Collective, cluster: Cluster, constants: Calibration) -> float:
    """Ring with as many rails as devices: the slower of link and network, and latency per node."""
    if collective.n_ranks == 1:
        return 0.0
    link = cluster.gpu.link_bytes_per_s * constants.link_frac
    network = cluster.nic_bits_per_s / 8 * constants.network_frac * collective.ranks_per_node
    seconds = collective.between_nodes_bytes / network
    if collective.ranks_per_node > 1:
        seconds = max(seconds, collective.sent_bytes / link)
    return seconds + collective.calls * collective.rounds * collective.nodes * HOP_S


def peak_flops(gpu: Gpu, precision: Precision) -> float:
    """Of one device; ConfigError where it cannot compute so."""
    if precision is Precision.fp32:
        return gpu.fp32_flops
    if precision is Precision.fp16:
        return gpu.fp16_flops
    if gpu.bf16_flops is None:
        raise ConfigError(
            f"cluster.gpu={gpu.name} has no bf16; use engine.precision=fp16, fp32 or another device"
        )
    return gpu.bf16_flops


def compute_s(
    model: ModelConfig, engine: EngineConfig, each: Pass, gpu: Gpu, constants: Calibration
) -> tuple[float, float]:
    """Of the forward and of the backward pass of one micro batch, recomputation included."""
    peak = peak_flops(gpu, engine.precision)
    dense, attention = matmul_flops_per_token(model), attention_flops_per_token(model, each.sequence_length)
    if each.masked:
        attention *= MASK_FACTOR
    kept = saved_bytes_per_token(model, element_bytes(engine), each.sequence_length, each.masked)
    memory = constants.passes * kept * model.n_layers / gpu.hbm_bytes_per_s
    per_token = (
        dense / (peak * constants.matmul_frac) + attention / (peak * constants.attention_frac) + memory
    )
    forward = each.tokens * per_token / 3
    again = {
        Recompute.none: 0.0,
        Recompute.selective: each.tokens * memory / 3,  # all but products and attention
        Recompute.full: forward,
    }
    return forward, 2 * forward + again[model.activation_checkpointing]


def optimizer_s(model: ModelConfig, engine: EngineConfig, sharding: Sharding, gpu: Gpu) -> float:
    """AdamW reads weight, gradient and two moments, writes three of them and the bf16 weight: 28 + 2 bytes."""
    share = count_parameters(model) / (sharding.n_shards if engine.zero_stage else 1)
    if not engine.offload_optimizer:
        return 30 * share / (gpu.hbm_bytes_per_s * HBM_FRAC)
    over = share * (4 + element_bytes(engine)) / gpu.pcie_bytes_per_s
    disk = 24 * share / NVME_BYTES_PER_S if engine.nvme_path is not None else 0.0  # 12 bytes read, 12 written
    return over + 30 * share / HOST_BYTES_PER_S + disk


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of one optimizer update by part; they add up to `total_s`."""

    compute_s: float
    """Of the device, or of the host where it is the slower."""
    exposed_communication_s: float
    optimizer_s: float
    communication_s: float
    """All of it, hidden or not."""
    tokens: int
    """Of the global batch."""
    model_flops: float
    """Of the global batch, without recomputation."""

    @property
    def total_s(self) -> float:
        """Of the step."""
        return self.compute_s + self.exposed_communication_s + self.optimizer_s

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        return self.tokens / self.total_s


def step_time(
    model: ModelConfig,
    engine: EngineConfig,
    sharding: Sharding,
    cluster: Cluster,
    each: Pass,
    accum_steps: int,
    *,
    constants: Calibration | None = None,
    host_s_per_block: float | None = None,
) -> StepTime:
    """One update of `accum_steps` micro batches.

    In each pass, communication hides behind computing: max(compute, communication) + exposed_frac of the smaller. What
    happens at the update hides behind nothing, but stage 1's reduction of the gradients, which overlaps the last
    backward pass. `host_s_per_block` None: HOST_S_PER_BLOCK.
    """
    fitted = constants or CALIBRATIONS[cluster.gpu.calibrated_as]
    micro, once = collectives(model, engine, sharding, cluster)
    forward, backward = compute_s(model, engine, each, cluster.gpu, fitted)
    host = HOST_S_PER_BLOCK[engine.zero_stage] if host_s_per_block is None else host_s_per_block
    third = host * model.n_layers / 3
    forward = max(forward, third)
    backward = max(backward, third * (2 if model.activation_checkpointing is Recompute.none else 3))
    seconds = dict.fromkeys(("forward", "backward", "update"), 0.0)
    for collective in (*micro, *once):
        seconds[collective.when] += collective_s(collective, cluster, fitted)
    if engine.offload_params:  # partitions come from the host before they are gathered
        from_host = element_bytes(engine) * count_parameters(model) / sharding.n_shards
        seconds["forward"] += from_host / cluster.gpu.pcie_bytes_per_s
        seconds["backward"] += from_host / cluster.gpu.pcie_bytes_per_s
    exposed = accum_steps * sum(
        max(0.0, moved - work) + fitted.exposed_frac * min(moved, work)
        for moved, work in ((seconds["forward"], forward), (seconds["backward"], backward))
    )
    reduced = sum(collective_s(c, cluster, fitted) for c in once if c.kind == "all-reduce")
    hidden = (1 - fitted.exposed_frac) * min(reduced, backward)
    exposed += seconds["update"] - hidden
    tokens = each.tokens * accum_steps * cluster.n_ranks
    return StepTime(
        compute_s=accum_steps * (forward + backward),
        exposed_communication_s=exposed,
        optimizer_s=optimizer_s(model, engine, sharding, cluster.gpu),
        communication_s=accum_steps * (seconds["forward"] + seconds["backward"]) + seconds["update"],
        tokens=tokens,
        model_flops=tokens * flops_per_token(model, each.sequence_length),
    )


def mfu_frac(step: StepTime, cluster: Cluster, precision: Precision) -> float:
    """Model FLOP utilization (Chowdhery et al., 2022), 0 to 1."""
    return step.model_flops / step.total_s / (cluster.n_ranks * peak_flops(cluster.gpu, precision))
