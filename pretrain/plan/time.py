"""The time of a step: bytes sent and seconds by part, as pure functions. Imports no torch.

The byte counts are those of DeepSpeed 0.19; they were counted in real runs (test_planner.py). The times are
computed from the peaks in data sheets and the constants in CALIBRATIONS, which benchmarks/fit_planner.py fits to
published runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.arithmetic import (
    adapter_parameters,
    attention_flops_per_token,
    flops_per_token,
    matmul_flops_per_token,
)
from pretrain.config import ModelConfig, Precision, Recompute
from pretrain.config.engine import EngineConfig
from pretrain.errors import ConfigError
from pretrain.plan.hardware import Gpu
from pretrain.plan.memory import (
    ALL_WEIGHTS,
    Partitioning,
    Pass,
    Updates,
    adapter_bytes_per_token,
    element_bytes,
    kept_elements,
    persistent_elements,
    saved_bytes_per_token,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Constants that are in no data sheet. benchmarks/fit_planner.py fits them."""

    matmul_frac: float
    """Share of the peak that matrix products reach."""
    attention_frac: float
    """Share of the peak that attention reaches if its operations are counted as if all tokens saw each other."""
    passes: float
    """Device memory traffic of both passes, as a multiple of the bytes that a block keeps for its backward pass."""
    exposed_frac: float
    """Fraction of the communication that could overlap with computation but does not."""
    link_frac: float
    """Share of the link's rate that collectives within a node reach."""
    network_frac: float
    """Share of the network's rate that collectives between nodes reach."""


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
"""Latency in seconds of a collective per node of its ring (assumed: runs of up to 8 nodes are too small to fit it)."""
HBM_FRAC = 0.8
"""Fraction of the memory bandwidth that an optimizer kernel reaches (assumed)."""
HOST_BYTES_PER_S = 30e9
"""Memory rate of a rank that updates on the host: AdamW moved 28 bytes for each of 57.7 million values in 54 ms."""
NVME_BYTES_PER_S = 1e9
"""Rate at which a rank reads or writes if the ranks of a host share a disk (assumed)."""
HOST_S_PER_BLOCK = {0: 4.8e-3, 1: 4.8e-3, 2: 4.8e-3, 3: 14.8e-3}
"""Seconds of the host's main thread per block and micro batch, forward and backward, by ZeRO stage. The thread launches
operations and, under stage 3, runs DeepSpeed's hooks; a device that finishes earlier waits for it. This is the CPU time
of 12 blocks minus that of 4 in 2-rank runs in which the computation itself takes almost no time. It is assumed to be
the same with a GPU."""
MASK_FACTOR = 2.0
"""Factor by which a mask slows down attention, since the kernel does not skip later tokens and computes twice as much
(assumed)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """The devices of a job, one per rank, and the network between them."""

    gpu: Gpu
    """Kind of the devices."""
    nodes: int
    """Number of nodes."""
    gpus_per_node: int
    """Number of devices in each node."""
    nic_bits_per_s: float
    """Network rate per device in one direction, in bits per second."""

    @property
    def n_ranks(self) -> int:
        """Number of ranks."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, kw_only=True, slots=True)
class Collective:
    """Collectives of one kind within one micro batch, or within one step."""

    kind: str
    """all-gather, reduce-scatter or all-reduce."""
    when: str
    """forward, backward or update."""
    payload_bytes: float
    """Size of the whole tensors, before the factor (N-1)/N of a ring."""
    calls: int
    """Number of calls that the payload is split into."""
    n_ranks: int
    """Number of ranks in the group."""
    ranks_per_node: int
    """Number of ranks of the group on one node."""

    @property
    def nodes(self) -> int:
        """Number of nodes that the group spans."""
        return -(-self.n_ranks // self.ranks_per_node)

    @property
    def rounds(self) -> int:
        """Number of passes around the ring: 2 for an all-reduce (a reduce-scatter and an all-gather), otherwise 1."""
        return 2 if self.kind == "all-reduce" else 1

    @property
    def sent_bytes(self) -> float:
        """Bytes that each rank sends."""
        return self.rounds * self.payload_bytes * (self.n_ranks - 1) / self.n_ranks

    @property
    def between_nodes_bytes(self) -> float:
        """Bytes that enter each node: all but its own part, once per round."""
        return self.rounds * self.payload_bytes * (self.nodes - 1) / self.nodes


def collectives(
    model: ModelConfig,
    engine: EngineConfig,
    partitioning: Partitioning,
    cluster: Cluster,
    updates: Updates = ALL_WEIGHTS,
) -> tuple[list[Collective], list[Collective]]:
    """The collectives of each micro batch, and those that run once per step.

    ZeRO stages 0 and 1 all-reduce gradients once per step, stage 2 in every micro batch, because DeepSpeed reduces its
    buckets to all ranks and not only to their owners. Stage 3 gathers parameters for the forward pass, again for the
    backward pass unless it has kept them, and scatters the sum of the gradients. Stages 1 and 2 gather parameters
    after the update. Frozen weights are gathered by stage 3, and have no gradients.
    """
    width, zero_stage = element_bytes(engine), engine.zero_stage
    trained, n = updates.trained(model), partitioning.ranks_per_copy
    everywhere = (cluster.n_ranks, min(cluster.gpus_per_node, cluster.n_ranks))
    buckets = max(1, -(-trained // engine.reduce_bucket_elements))

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
        reduced = make(
            "all-reduce", "backward" if zero_stage == 2 else "update", trained, buckets, everywhere
        )
        gathered = [make("all-gather", "update", trained, 1, everywhere)] if zero_stage else []
        return ([reduced], gathered) if zero_stage == 2 else ([], [reduced, *gathered])
    shards = (n, min(cluster.gpus_per_node, n))
    small, kept = persistent_elements(model, engine, updates), kept_elements(model, engine, updates)
    forward = updates.total(model) - small
    backward = forward - kept
    blocks = model.n_layers + 2
    near = min(engine.hpz_partition_ranks, n)
    again = (near, near) if near > 1 else shards
    each = [
        make("all-gather", "forward", forward / (2 if engine.quantized_weights else 1), blocks, shards),
        make("all-gather", "backward", backward, blocks if backward else 0, again),
        make(
            "reduce-scatter", "backward", trained / (4 if engine.quantized_gradients else 1), buckets, shards
        ),
    ]
    once = [make("all-gather", "update", small, 1, shards)] if small else []
    copies = cluster.n_ranks // n
    if copies > 1:  # hybrid sharding: each rank sums its gradients with those of its peers in other copies
        per_node = max(1, cluster.gpus_per_node // n)
        calls = max(1, -(-trained // n // engine.reduce_bucket_elements))
        once.append(make("all-reduce", "update", trained / n, calls, (copies, per_node)))
    return [c for c in each if c.payload_bytes], once


def collective_s(collective: Collective, cluster: Cluster, constants: Calibration) -> float:
    """Seconds of a collective on a ring with one rail per device: the slower of link and network, plus latency."""
    if collective.n_ranks == 1:
        return 0.0
    link = cluster.gpu.link_bytes_per_s * constants.link_frac
    network = cluster.nic_bits_per_s / 8 * constants.network_frac * collective.ranks_per_node
    seconds = collective.between_nodes_bytes / network
    if collective.ranks_per_node > 1:
        seconds = max(seconds, collective.sent_bytes / link)
    return seconds + collective.calls * collective.rounds * collective.nodes * HOP_S


def peak_flops(gpu: Gpu, precision: Precision) -> float:
    """The peak of one device in FLOP/s. Raises ConfigError if the device does not have this precision."""
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
    model: ModelConfig,
    engine: EngineConfig,
    each: Pass,
    gpu: Gpu,
    constants: Calibration,
    updates: Updates = ALL_WEIGHTS,
) -> tuple[float, float]:
    """Seconds of the forward and the backward pass of one micro batch, including recomputation."""
    peak, lora = peak_flops(gpu, engine.precision), updates.lora
    weights, attention = matmul_flops_per_token(model), attention_flops_per_token(model, each.sequence_length)
    dense = weights + 6.0 * adapter_parameters(model, lora)
    if each.masked:
        attention *= MASK_FACTOR
    kept = saved_bytes_per_token(model, element_bytes(engine), each.sequence_length, each.masked)
    kept += adapter_bytes_per_token(model, lora, element_bytes(engine))
    memory = constants.passes * kept * model.n_layers / gpu.hbm_bytes_per_s
    per_token = (
        dense / (peak * constants.matmul_frac) + attention / (peak * constants.attention_frac) + memory
    )
    forward = each.tokens * per_token / 3
    # Frozen weights have no gradient, which is a third of the products with them.
    spared = each.tokens * weights / 3 / (peak * constants.matmul_frac) if lora.r else 0.0
    again = {
        Recompute.none: 0.0,
        Recompute.selective: each.tokens * memory / 3,  # everything but products and attention is recomputed
        Recompute.full: forward,
    }
    return forward, 2 * forward - spared + again[model.activation_checkpointing]


def optimizer_s(
    model: ModelConfig,
    engine: EngineConfig,
    partitioning: Partitioning,
    gpu: Gpu,
    updates: Updates = ALL_WEIGHTS,
) -> float:
    """Seconds of an AdamW update.

    It reads weight, gradient and two moments, and writes weight, moments and the bf16 weight: 28 + 2 bytes per
    parameter. An update of the moving average reads it and the weight, and writes it: 12 bytes.
    """
    share = updates.trained(model) / (partitioning.ranks_per_copy if engine.zero_stage else 1)
    ema = updates.ema
    averaged = 0.0 if ema.decay is None else 12 * share / ema.every_steps
    if not engine.offload_optimizer:
        return (30 * share + averaged) / (gpu.hbm_bytes_per_s * HBM_FRAC)
    over = share * (4 + element_bytes(engine)) / gpu.pcie_bytes_per_s
    disk = (
        24 * share / NVME_BYTES_PER_S if engine.nvme_path is not None else 0.0
    )  # 12 bytes are read and 12 are written
    return over + (30 * share + averaged) / HOST_BYTES_PER_S + disk


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """The time of one step by part, in seconds. Compute, exposed communication and optimizer add up to `total_s`."""

    compute_s: float
    """Time of the forward and backward passes on the device, or on the host where that is slower."""
    exposed_communication_s: float
    """Time of the communication that does not overlap with computation."""
    optimizer_s: float
    """Time of the optimizer's update."""
    communication_s: float
    """Time of all communication, overlapped or not."""
    tokens: int
    """Number of tokens in the global batch."""
    model_flops: float
    """Floating-point operations for the global batch, without recomputation."""

    @property
    def total_s(self) -> float:
        """Total time of the step in seconds."""
        return self.compute_s + self.exposed_communication_s + self.optimizer_s

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all ranks together."""
        return self.tokens / self.total_s


def step_time(
    model: ModelConfig,
    engine: EngineConfig,
    partitioning: Partitioning,
    cluster: Cluster,
    each: Pass,
    accum_steps: int,
    *,
    constants: Calibration | None = None,
    host_s_per_block: float | None = None,
    updates: Updates = ALL_WEIGHTS,
) -> StepTime:
    """The time of one step of `accum_steps` micro batches.

    In each pass communication overlaps with computation, so the pass takes max(compute, communication) plus
    exposed_frac of the smaller of the two. Communication at the update overlaps with nothing, except for the reduction
    of the gradients in ZeRO stage 1, which overlaps with the last backward pass. `host_s_per_block` is HOST_S_PER_BLOCK
    by default.
    """
    fitted = constants or CALIBRATIONS[cluster.gpu.calibrated_as]
    micro, once = collectives(model, engine, partitioning, cluster, updates)
    forward, backward = compute_s(model, engine, each, cluster.gpu, fitted, updates)
    host = HOST_S_PER_BLOCK[engine.zero_stage] if host_s_per_block is None else host_s_per_block
    third = host * model.n_layers / 3
    forward = max(forward, third)
    backward = max(backward, third * (2 if model.activation_checkpointing is Recompute.none else 3))
    seconds = dict.fromkeys(("forward", "backward", "update"), 0.0)
    for collective in (*micro, *once):
        seconds[collective.when] += collective_s(collective, cluster, fitted)
    if engine.offload_params:  # partitions are copied from the host before they are gathered
        from_host = element_bytes(engine) * updates.total(model) / partitioning.ranks_per_copy
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
        optimizer_s=optimizer_s(model, engine, partitioning, cluster.gpu, updates),
        communication_s=accum_steps * (seconds["forward"] + seconds["backward"]) + seconds["update"],
        tokens=tokens,
        model_flops=tokens * flops_per_token(model, each.sequence_length, updates.lora),
    )


def mfu_frac(step: StepTime, cluster: Cluster, precision: Precision) -> float:
    """Model FLOP utilization (Chowdhery et al., 2022), 0 to 1."""
    return step.model_flops / step.total_s / (cluster.n_ranks * peak_flops(cluster.gpu, precision))
