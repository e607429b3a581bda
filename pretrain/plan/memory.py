"""The memory of a rank in bytes, by part: a pure function of configuration and number of ranks. Imports no torch.

There are P parameters, of which S are small enough to stay whole under ZeRO stage 3, and N ranks over which the state
is partitioned. The table shows the bytes per parameter that DeepSpeed 0.19 holds, where w is the width in bytes of a
working parameter. They were found by counting the storages of real runs (test_planner.py):

              parameters    masters   moments   gradients
    stage 0   4             0         8         4            fp32 only
    stage 1   w             4/N       8/N       w            w: 2 in bf16, 4 in fp32
    stage 2   w             4/N       8/N       w/N
    stage 3   w/N + w S/P   4/N       8/N       4/N

In bf16, stages 1 and 2 also convert their share of the gradients to fp32 during the update, which takes 4/N more.
ZeRO: Rajbhandari et al., 2020. Activations are the tensors that autograd keeps for each operation of
`pretrain.model.decoder`; compare Korthikanti et al., 2022.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.arithmetic import block_parameters, count_parameters, parameter_sizes
from pretrain.config import ModelConfig, Precision, Recompute
from pretrain.config.engine import NVME_SUB_GROUP_ELEMENTS, EngineConfig
from pretrain.plan.hardware import GIB

CONTEXT_BYTES = 1.5 * GIB
"""Bytes for the CUDA context and the buffers of NCCL and cuBLAS (assumed)."""
FRAGMENTATION_FRAC = 0.06
"""Memory that the allocator reserves but does not hand out, as a fraction of the memory handed out (assumed)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Partitioning:
    """The number of ranks over which the state of a model is partitioned. In plain ZeRO these are all ranks."""

    n_ranks: int
    """Number of ranks of the job."""
    ranks_per_copy: int
    """Number of ranks that together hold one copy of the state; the job has n_ranks / ranks_per_copy copies."""


def persistent_elements(model: ModelConfig, engine: EngineConfig) -> int:
    """S: number of elements in the parameters that ZeRO stage 3 keeps whole on every rank."""
    if engine.zero_stage != 3:
        return 0
    return sum(
        size * count
        for size, count in parameter_sizes(model)
        if size <= engine.persistence_threshold_elements
    )


def element_bytes(engine: EngineConfig) -> int:
    """Bytes of one element of a working weight or an activation."""
    return 4 if engine.precision is Precision.fp32 else 2


def kept_elements(model: ModelConfig, engine: EngineConfig) -> int:
    """Number of gathered elements that ZeRO stage 3 keeps between the forward and the backward pass.

    When a module is done, DeepSpeed 0.19 looks `max_live_elements` elements ahead and keeps the parameters that will be
    used again within them. A block, which is gathered as a whole, is kept if the backward pass reaches it within this
    number. When DeepSpeed looks ahead from the embedding, it counts the norm and the head, but not the blocks.
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


def state_bytes(model: ModelConfig, engine: EngineConfig, partitioning: Partitioning) -> dict[str, int]:
    """Bytes of weights, masters, moments and gradients that a rank holds between steps, in memory or on disk."""
    n, zero_stage = partitioning.ranks_per_copy, engine.zero_stage
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
                "persistent parameters": width * small
                if n > 1
                else 0,  # a single rank already holds everything whole
                "masters": 4 * share,
                "moments": 8 * share,
                "gradients": 4 * share,
            }
            if engine.hpz_partition_ranks > 1:
                held["secondary parameters (hpZ)"] = width * -(-total // engine.hpz_partition_ranks)
            return held


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """The input of one forward and backward pass of a rank."""

    sequences: int
    """B: number of sequences."""
    sequence_length: int
    """T: tokens per sequence."""
    masked: bool
    """Whether attention gets a mask [B, 1, T, T], which only document masking with kernels.attention=sdpa needs."""

    @property
    def tokens(self) -> int:
        """Number of tokens of one rank, B x T."""
        return self.sequences * self.sequence_length


def saved_bytes_per_token(model: ModelConfig, width: int, sequence_length: int, masked: bool) -> int:
    """Bytes per token that autograd keeps of one block for its backward pass, with fused norms as on a GPU.

    With `width` bytes per element, it keeps the residual stream twice and the outputs of the norms (4 D), queries and
    the output of attention (2 H K), keys and values (2 G K, or 2 H K if they are repeated because of a mask), and
    gate, up, silu(gate) and their product (4 F). In fp32 it keeps two inverse norms, and the log-sum-exp of
    each head. With a mask, the kernel also keeps the token's mask row of T elements in each layer.
    """
    q, kv = model.n_heads * model.head_width, model.kv_heads * model.head_width
    elements = 4 * model.d_model + 2 * q + 2 * (q if masked else kv) + 4 * model.d_ff
    if model.qk_norm:
        elements += q + kv
    statistics = 2 + model.n_heads
    return width * elements + 4 * statistics + (width * sequence_length if masked else 0)


def selected_bytes_per_token(model: ModelConfig, width: int) -> int:
    """Bytes per token that selective activation checkpointing keeps of one block.

    It keeps the block's input (D), the results of products (queries, keys, values, the attention layer's output (D),
    gate and up (2 F), the feed-forward layer's output (D)), the result of attention itself (H K), and one fp32
    log-sum-exp per head.
    """
    q, kv = model.n_heads * model.head_width, model.kv_heads * model.head_width
    return width * (3 * model.d_model + 2 * q + 2 * kv + 2 * model.d_ff) + 4 * model.n_heads


def activation_bytes(model: ModelConfig, engine: EngineConfig, each: Pass) -> dict[str, int]:
    """Peak bytes of the activations of one micro batch, by part."""
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
    # One chunk of the loss holds log-probabilities, their gradient and the gradient of the logits, all in fp32.
    logits = 12 * model.vocab_size * min(tokens, model.loss_chunk_tokens)
    # While the head runs, no block is recomputed, so only the larger of the two counts.
    tables = 8 * tokens * model.head_width + (each.sequence_length * tokens if each.masked else 0)
    # The workspace holds gradients of a block's widest intermediate, or rotary positions in fp32.
    workspace = tokens * max(3 * width * model.d_ff, 12 * model.n_heads * model.head_width)
    return {
        "activations kept": kept + 2 * stream + tables,
        "one block or the logits": max(at_work + workspace, logits),
    }


def buffer_bytes(model: ModelConfig, engine: EngineConfig, partitioning: Partitioning) -> dict[str, int]:
    """Peak bytes of gathered parameters and of the buckets for communication."""
    width, zero_stage, total = element_bytes(engine), engine.zero_stage, count_parameters(model)
    largest = max(size for size, _ in parameter_sizes(model))
    if zero_stage == 0:
        return {"buckets": 0}
    # A gradient that is larger than a bucket is sent alone. One bucket is filled while the other is being sent.
    bucket = max(min(engine.reduce_bucket_elements, total), largest)
    found = {"buckets": 2 * width * bucket}
    if zero_stage == 3:
        partitioned = total - persistent_elements(model, engine)
        ahead = engine.prefetch_bucket_elements + max(block_parameters(model), largest)
        live = min(partitioned, kept_elements(model, engine) + ahead)
        found["gathered parameters"] = width * live
    elif engine.precision is not Precision.fp32:
        found["gradients in fp32"] = 4 * -(-total // partitioning.ranks_per_copy)
    return found


def memory_bytes(
    model: ModelConfig, engine: EngineConfig, partitioning: Partitioning, each: Pass
) -> tuple[dict[str, int], dict[str, int]]:
    """Peak bytes of one rank by part: on the device, and in host memory."""
    device: dict[str, int] = state_bytes(model, engine, partitioning)
    host: dict[str, int] = {}
    if engine.offload_optimizer:
        for part in ("masters", "moments", "gradients"):
            if part != "gradients" or engine.zero_stage > 1:
                host[part] = device.pop(part)
    if engine.nvme_path is not None:  # gradients stay in memory, and so do four buffers of one sub-group
        del host["masters"], host["moments"]
        share = -(-count_parameters(model) // partitioning.ranks_per_copy)
        host["buffers for NVMe"] = 4 * 4 * min(NVME_SUB_GROUP_ELEMENTS, share)
    if engine.offload_params:
        host["parameters"] = device.pop("parameters")
    device |= buffer_bytes(model, engine, partitioning)
    if engine.offload_optimizer and "gradients in fp32" in device:
        host["gradients in fp32"] = device.pop("gradients in fp32")
    device |= activation_bytes(model, engine, each)
    # A save copies weights and moments to page-locked memory, which is kept for the next save.
    host["copy for saving"] = 12 * -(-count_parameters(model) // partitioning.n_ranks)
    device["context"] = int(CONTEXT_BYTES)
    device["fragmentation"] = int(FRAGMENTATION_FRAC * (sum(device.values()) - device["context"]))
    return device, host
