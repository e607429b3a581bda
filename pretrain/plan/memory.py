"""What a rank holds: bytes by part, as a pure function of the configuration and the number of ranks. Imports no torch.

P parameters, S of them small enough to stay whole under stage 3, N ranks that the state is cut over. Bytes per
parameter as DeepSpeed 0.19 holds them, found by counting the storages of real runs (tests/test_planner.py):

              parameters    masters   moments   gradients
    stage 0   4             0         8         4            fp32 only
    stage 1   w             4/N       8/N       w            w: 2 in bf16, 4 in fp32
    stage 2   w             4/N       8/N       w/N
    stage 3   w/N + w S/P   4/N       8/N       4/N

and in bf16, stages 1 and 2 turn their share of the gradients to fp32 while they update: 4/N more.
ZeRO: Rajbhandari et al., 2020. Activations: what autograd keeps of each operation of `pretrain.model.decoder`, compare
Korthikanti et al., 2022.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.arithmetic import block_parameters, count_parameters, parameter_sizes
from pretrain.config import ModelConfig, Precision, Recompute
from pretrain.config.engine import NVME_SUB_GROUP_ELEMENTS, EngineConfig
from pretrain.plan.hardware import GIB

CONTEXT_BYTES = 1.5 * GIB
"""Assumed: CUDA context, NCCL's and cuBLAS's buffers."""
FRAGMENTATION_FRAC = 0.06
"""Assumed: of all that the allocator serves, how much more it reserves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """Over how many ranks the state of a model is cut. Plain ZeRO: all of them."""

    n_ranks: int
    """Ranks of the job."""
    n_shards: int
    """Ranks that hold one copy of the state together; the job has n_ranks / n_shards copies."""


def persistent_elements(model: ModelConfig, engine: EngineConfig) -> int:
    """S: elements of the parameters that stage 3 keeps whole on every rank."""
    if engine.zero_stage != 3:
        return 0
    return sum(
        size * count
        for size, count in parameter_sizes(model)
        if size <= engine.persistence_threshold_elements
    )


def element_bytes(engine: EngineConfig) -> int:
    """Of a weight or an activation that computes."""
    return 4 if engine.precision is Precision.fp32 else 2


def kept_elements(model: ModelConfig, engine: EngineConfig) -> int:
    """Stage 3: gathered elements that are not let go between the forward and the backward pass.

    When a part is done, DeepSpeed 0.19 looks `max_live_elements` elements ahead and keeps what comes again. A block,
    gathered as a whole, is kept where the backward pass begins within them; when it looks ahead from the embedding, it
    counts the norm and the head, but not the blocks.
    """
    if engine.zero_stage != 3:
        return 0
    (matrix, matrices), *_ = parameter_sizes(model)
    limit, tail = engine.max_live_elements, matrix + model.d_model
    blocks = min(model.n_layers, max(0, -(-(limit - tail) // block_parameters(model))))
    partitioned = count_parameters(model) - persistent_elements(model, engine)
    if matrix <= engine.persistence_threshold_elements:
        return partitioned * blocks // model.n_layers
    kept_matrices = (limit > 0) + (limit > 2 * tail and matrices == 2)  # the head, the embedding
    return (partitioned - matrix * matrices) * blocks // model.n_layers + matrix * kept_matrices


def state_bytes(model: ModelConfig, engine: EngineConfig, sharding: Sharding) -> dict[str, int]:
    """Bytes of weights, masters, moments and gradients at rest that one rank holds, wherever they are kept."""
    n, zero_stage = sharding.n_shards, engine.zero_stage
    total, width = count_parameters(model), element_bytes(engine)
    cut = sum(count * -(-size // n) for size, count in parameter_sizes(model))
    share = cut if zero_stage == 3 else -(-total // n)
    small = persistent_elements(model, engine)
    match zero_stage:
        case 0:
            return {"parameters": 4 * total, "masters": 0, "moments": 8 * total, "gradients": 4 * total}
        case 1 | 2:
            return {
                "parameters": width * total,
                "masters": 4 * share,
                "moments": 8 * share,
                "gradients": width * (total if zero_stage == 1 else share),
            }
        case _:
            held = {
                "parameters": width * share,
                "persistent parameters": width * small if n > 1 else 0,  # one rank holds all whole anyway
                "masters": 4 * share,
                "moments": 8 * share,
                "gradients": 4 * share,
            }
            if engine.hpz_partition_ranks > 1:
                held["secondary parameters (hpZ)"] = width * -(-total // engine.hpz_partition_ranks)
            return held


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """What one forward and backward pass of a rank takes."""

    sequences: int
    """B."""
    sequence_length: int
    """T, tokens."""
    masked: bool
    """Attention gets a mask [B, 1, T, T], as with documents and kernels.attention=sdpa; others need none."""

    @property
    def tokens(self) -> int:
        """Of one rank."""
        return self.sequences * self.sequence_length


def saved_bytes_per_token(model: ModelConfig, width: int, sequence_length: int, masked: bool) -> int:
    """What autograd keeps of one block for its backward pass, bytes per token, with fused norms as on a GPU.

    `width` bytes per element: the residual stream twice and what the norms make of it (4 D), queries and what
    attention returns (2 H K), keys and values (2 G K, or 2 H K where a mask makes them be repeated), gate, up,
    silu(gate) and their product (4 F). In fp32: two inverse norms, and the log-sum-exp of each head. With a mask:
    its row of T elements, which the kernel keeps for each layer.
    """
    q, kv = model.n_heads * model.head_width, model.kv_heads * model.head_width
    elements = 4 * model.d_model + 2 * q + 2 * (q if masked else kv) + 4 * model.d_ff
    if model.qk_norm:
        elements += q + kv
    statistics = 2 + model.n_heads
    return width * elements + 4 * statistics + (width * sequence_length if masked else 0)


def selected_bytes_per_token(model: ModelConfig, width: int) -> int:
    """What selective activation checkpointing keeps of one block, bytes per token.

    Its input (D), and the results of products: queries, keys, values, the output of attention (D), gate and up (2 F),
    the output of the feed-forward layer (D); and of attention (H K, and a log-sum-exp in fp32 for each head).
    """
    q, kv = model.n_heads * model.head_width, model.kv_heads * model.head_width
    return width * (3 * model.d_model + 2 * q + 2 * kv + 2 * model.d_ff) + 4 * model.n_heads


def activation_bytes(model: ModelConfig, engine: EngineConfig, each: Pass) -> dict[str, int]:
    """Peak of one micro batch by part."""
    width, tokens = element_bytes(engine), each.tokens
    block = tokens * saved_bytes_per_token(model, width, each.sequence_length, each.masked)
    stream = width * tokens * model.d_model
    match model.activation_checkpointing:
        case Recompute.none:
            kept, at_work = model.n_layers * block, 0
        case Recompute.selective:
            kept, at_work = model.n_layers * tokens * selected_bytes_per_token(model, width), block
        case Recompute.full:
            kept, at_work = model.n_layers * stream, block
    assert model.vocab_size is not None
    # Log-probabilities, their gradient and that of the logits, fp32, of one chunk.
    logits = 12 * model.vocab_size * min(tokens, model.loss_chunk_tokens)
    # While the head runs, no block is being recomputed: the greater of the two counts.
    tables = 8 * tokens * model.head_width + (each.sequence_length * tokens if each.masked else 0)
    # Gradients of the widest intermediate of a block, and rotary positions in fp32.
    workspace = tokens * max(3 * width * model.d_ff, 12 * model.n_heads * model.head_width)
    return {
        "activations kept": kept + 2 * stream + tables,
        "one block or the logits": max(at_work + workspace, logits),
    }


def buffer_bytes(model: ModelConfig, engine: EngineConfig, sharding: Sharding) -> dict[str, int]:
    """Gathered parameters and the buckets of communication, at their largest."""
    width, zero_stage, total = element_bytes(engine), engine.zero_stage, count_parameters(model)
    largest = max(size for size, _ in parameter_sizes(model))
    if zero_stage == 0:
        return {"buckets": 0}
    # A gradient that is larger than a bucket travels alone; one bucket fills while the other is on its way.
    bucket = max(min(engine.reduce_bucket_elements, total), largest)
    found = {"buckets": 2 * width * bucket}
    if zero_stage == 3:
        partitioned = total - persistent_elements(model, engine)
        ahead = engine.prefetch_bucket_elements + max(block_parameters(model), largest)
        live = min(partitioned, kept_elements(model, engine) + ahead)
        found["gathered parameters"] = width * live
    elif engine.precision is not Precision.fp32:
        found["gradients in fp32"] = 4 * -(-total // sharding.n_shards)
    return found


def memory_bytes(
    model: ModelConfig, engine: EngineConfig, sharding: Sharding, each: Pass
) -> tuple[dict[str, int], dict[str, int]]:
    """Peak bytes of one rank by part: on the device, and in host memory."""
    device: dict[str, int] = state_bytes(model, engine, sharding)
    host: dict[str, int] = {}
    if engine.offload_optimizer:
        for part in ("masters", "moments", "gradients"):
            if part != "gradients" or engine.zero_stage > 1:
                host[part] = device.pop(part)
    if engine.nvme_path is not None:  # the gradients stay, and four buffers of what is updated at a time
        del host["masters"], host["moments"]
        share = -(-count_parameters(model) // sharding.n_shards)
        host["buffers for NVMe"] = 4 * 4 * min(NVME_SUB_GROUP_ELEMENTS, share)
    if engine.offload_params:
        host["parameters"] = device.pop("parameters")
    device |= buffer_bytes(model, engine, sharding)
    if engine.offload_optimizer and "gradients in fp32" in device:
        host["gradients in fp32"] = device.pop("gradients in fp32")
    device |= activation_bytes(model, engine, each)
    # A save copies weights and moments to page-locked memory, which is kept for the next.
    host["copy for saving"] = 12 * -(-count_parameters(model) // sharding.n_ranks)
    device["context"] = int(CONTEXT_BYTES)
    device["fragmentation"] = int(FRAGMENTATION_FRAC * (sum(device.values()) - device["context"]))
    return device, host
