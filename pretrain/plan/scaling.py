"""Projected step time and efficiency of ZeRO-3, ZeRO++ and hybrid sharding: the table of docs/scaling.md."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pretrain.config import EngineConfig, ModelConfig, Precision, Recompute
from pretrain.plan.hardware import known_gpu
from pretrain.plan.memory import Partitioning, Pass, memory_bytes
from pretrain.plan.time import Cluster, StepTime, mfu_frac, step_time

SEQUENCE_LENGTH = 4096
GLOBAL_BATCH_SEQUENCES = 4096
"""Sequences per step, 16.8 million tokens. It is the same for every number of GPUs, and gives each at least one."""
GPU_COUNTS = (8, 32, 128, 512, 1024, 4096)
GPUS_PER_NODE = 8
MICRO_BATCHES = (1, 2, 4, 8)
# The shapes of conf/model/, with Llama 2's vocabulary. A test compares the two.
SHAPES = {
    "1b": ModelConfig(n_layers=22, d_model=2048, n_heads=32, n_kv_heads=4, d_ff=5632, vocab_size=32_000),
    "7b": ModelConfig(n_layers=32, d_model=4096, n_heads=32, d_ff=11008, vocab_size=32_000),
    "70b": ModelConfig(n_layers=80, d_model=8192, n_heads=64, n_kv_heads=8, d_ff=28672, vocab_size=32_000),
}
ENGINE = EngineConfig(zero_stage=3, precision=Precision.bf16)
ZEROPP = replace(ENGINE, hpz_partition_ranks=GPUS_PER_NODE, quantized_weights=True, quantized_gradients=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """One way to partition the state under ZeRO stage 3."""

    name: str
    """Name of the column in the table."""
    engine: EngineConfig
    """The engine configuration."""
    hybrid: bool = False
    """Whether groups of ranks hold copies of the state."""


SCHEMES = (
    Scheme(name="ZeRO-3", engine=ENGINE),
    Scheme(name="ZeRO++", engine=ZEROPP),
    Scheme(name="hybrid", engine=ENGINE, hybrid=True),
)


def best_step(model: ModelConfig, scheme: Scheme, cluster: Cluster) -> tuple[StepTime, int] | None:
    """The fastest step that fits, and the number of ranks that share one copy; None if nothing fits.

    Hybrid sharding uses the fewest nodes that can hold a copy.
    """
    n = cluster.n_ranks
    groups = [n]
    if scheme.hybrid:
        groups = [GPUS_PER_NODE * 2**k for k in range(20) if GPUS_PER_NODE * 2**k <= n]
    for ranks_per_copy in groups:
        found: list[StepTime] = []
        for micro in MICRO_BATCHES:
            share = GLOBAL_BATCH_SEQUENCES // n
            if share % micro:
                continue
            for recompute in Recompute:
                shape = replace(model, activation_checkpointing=recompute)
                partitioning = Partitioning(n_ranks=n, ranks_per_copy=ranks_per_copy)
                each = Pass(sequences=micro, sequence_length=SEQUENCE_LENGTH, masked=False)
                device, _ = memory_bytes(shape, scheme.engine, partitioning, each)
                if sum(device.values()) <= cluster.gpu.memory_bytes:
                    found.append(step_time(shape, scheme.engine, partitioning, cluster, each, share // micro))
        if found:
            return min(found, key=lambda step: step.total_s), ranks_per_copy
    return None


def scaling_table() -> str:
    """A Markdown table of step time, MFU and efficiency of each scheme, with a row per model and number of GPUs."""
    names = " | ".join(f"{s.name}, projected: step, MFU, efficiency" for s in SCHEMES)
    lines = [f"| model | H100 | {names} |", f"|---|---|{'---|' * len(SCHEMES)}"]
    for label, model in SHAPES.items():
        reference: float | None = None
        for count in GPU_COUNTS:
            gpu = known_gpu("h100")
            cluster = Cluster(
                gpu=gpu,
                nodes=count // GPUS_PER_NODE,
                gpus_per_node=GPUS_PER_NODE,
                nic_bits_per_s=gpu.nic_bits_per_s,
            )
            cells = []
            for scheme in SCHEMES:
                best = best_step(model, scheme, cluster)
                if best is None:
                    cells.append("does not fit")
                    continue
                step, ranks_per_copy = best
                per_rank = step.tokens_per_second / count
                reference = reference or per_rank
                shards = f", {ranks_per_copy} share a copy" if scheme.hybrid else ""
                mfu = mfu_frac(step, cluster, ENGINE.precision)
                cells.append(f"{step.total_s:.2f} s, {mfu:.1%}, {per_rank / reference:.0%}{shards}")
            lines.append(f"| {label} | {count:,} | {' | '.join(cells)} |")
    return "\n".join(lines)
