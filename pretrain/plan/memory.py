"""The memory of a rank in bytes, by part: a pure function of configuration and number of ranks. Imports no torch.

There are P parameters, of which S are small enough to stay whole under ZeRO stage 3, and N ranks over which the state
is partitioned. The table shows the bytes per parameter that DeepSpeed 0.19 holds, where w is the width in bytes of a
working parameter. They were found by counting the storages of real runs (test_planner.py):

              parameters    masters   moments   gradients
    stage 0   4             0         8         4            fp32 only
    stage 1   w             4/N       8/N       w            w: 2 in bf16, 4 in fp32
    stage 2   w             4/N       8/N       w/N
    stage 3   w/N + w S/P   4/N       8/N       4/N

A moving average of the weights takes 4/N more in every stage. With adapters (LoRA), P in the first column counts the
frozen weights and the adapters, and in the others only the adapters.

In bf16, stages 1 and 2 also convert their share of the gradients to fp32 during the update, which takes 4/N more.
ZeRO: Rajbhandari et al., 2020. Activations are the tensors that autograd keeps for each operation of
`pretrain.model.decoder`; compare Korthikanti et al., 2022.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pretrain.arithmetic import (
    adapted_shapes,
    adapter_parameters,
    adapter_sizes,
    block_parameters,
    count_parameters,
    parameter_sizes,
)
from pretrain.config import EmaConfig, LoraConfig, ModelConfig, Precision, Recompute
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Updates:
    """What the updates of a run change: all weights or only adapters, and a moving average of them."""

    lora: LoraConfig = field(default_factory=LoraConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)

    def sizes(self, model: ModelConfig) -> list[tuple[int, int]]:
        """(elements, count) for each kind of parameter, frozen or trained."""
        return parameter_sizes(model) + adapter_sizes(model, self.lora)

    def trained_sizes(self, model: ModelConfig) -> list[tuple[int, int]]:
        """(elements, count) for each kind of parameter that is trained."""
        return adapter_sizes(model, self.lora) if self.lora.r else parameter_sizes(model)

    def total(self, model: ModelConfig) -> int:
        """The number of values, frozen or trained."""
        return count_parameters(model) + adapter_parameters(model, self.lora)

    def trained(self, model: ModelConfig) -> int:
        """The number of values that are trained."""
        return adapter_parameters(model, self.lora) if self.lora.r else count_parameters(model)

    @property
    def saved_bytes(self) -> int:
        """Bytes of a checkpoint per trained value: it, two moments and its average, in fp32."""
        return 12 if self.ema.decay is None else 16


ALL_WEIGHTS = Updates()


def persistent_elements(model: ModelConfig, engine: EngineConfig, updates: Updates = ALL_WEIGHTS) -> int:
    """S: number of elements in the parameters that ZeRO stage 3 keeps whole on every rank."""
    if engine.zero_stage != 3:
        return 0
    return sum(
        size * count for size, count in updates.sizes(model) if size <= engine.persistence_threshold_elements
    )


def element_bytes(engine: EngineConfig) -> int:
    """Bytes of one element of a working weight or an activation."""
    return 4 if engine.precision is Precision.fp32 else 2


def kept_elements(model: ModelConfig, engine: EngineConfig, updates: Updates = ALL_WEIGHTS) -> int:
    """Number of gathered elements that ZeRO stage 3 keeps between the forward and the backward pass.

    When a module is done, DeepSpeed 0.19 looks `max_live_elements` elements ahead and keeps the parameters that will be
    used again within them. A block, which is gathered as a whole, is kept if the backward pass reaches it within this
    number. When DeepSpeed looks ahead from the embedding, it counts the norm and the head, but not the blocks.
    """
    if engine.zero_stage != 3:
        return 0
    (matrix, matrices), *_ = parameter_sizes(model)
    limit, tail = engine.max_live_elements, matrix + model.d_model
    blocks = min(model.n_layers, max(0, -(-(limit - tail) // block_elements(model, updates))))
    partitioned = updates.total(model) - persistent_elements(model, engine, updates)
    if matrix <= engine.persistence_threshold_elements:
        return partitioned * blocks // model.n_layers
    kept_matrices = (limit > 0) + (limit > 2 * tail and matrices == 2)  # the head, the embedding
    return (partitioned - matrix * matrices) * blocks // model.n_layers + matrix * kept_matrices


def block_elements(model: ModelConfig, updates: Updates) -> int:
    """The number of values of one transformer block, with its adapters."""
    return block_parameters(model) + adapter_parameters(model, updates.lora) // model.n_layers


def state_bytes(
    model: ModelConfig, engine: EngineConfig, partitioning: Partitioning, updates: Updates = ALL_WEIGHTS
) -> dict[str, int]:
    """Bytes of weights, masters, moments and gradients that a rank holds between steps, in memory or on disk."""
    n, zero_stage = partitioning.ranks_per_copy, engine.zero_stage
    total, trained, width = updates.total(model), updates.trained(model), element_bytes(engine)
    cut = _cut_evenly(updates.trained_sizes(model), n)
    share = cut if zero_stage == 3 else -(-trained // n)
    match zero_stage:
        case 0:
            held = {"parameters": 4 * total, "masters": 0, "moments": 8 * trained, "gradients": 4 * trained}
        case 1 | 2:
            held = {
                "parameters": width * total,
                "masters": 4 * share,
                "moments": 8 * share,
                "gradients": width * (trained if zero_stage == 1 else share),
            }
        case _:
            small = persistent_elements(model, engine, updates)
            held = {
                "parameters": width * _cut_evenly(updates.sizes(model), n),
                "persistent parameters": width * small
                if n > 1
                else 0,  # a single rank already holds everything whole
                "masters": 4 * share,
                "moments": 8 * share,
                "gradients": 4 * share,
            }
            if engine.hpz_partition_ranks > 1:
                held["secondary parameters (hpZ)"] = width * -(-total // engine.hpz_partition_ranks)
    if updates.ema.decay is not None:
        held["moving average"] = 4 * (share if zero_stage else cut)
    return held


def _cut_evenly(sizes: list[tuple[int, int]], n_ranks: int) -> int:
    """The number of values on one of the ranks over which each parameter is cut."""
    return sum(count * -(-size // n_ranks) for size, count in sizes)


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


def selected_bytes_per_token(model: ModelConfig, width: int, lora: LoraConfig | None = None) -> int:
    """Bytes per token that selective activation checkpointing keeps of one block.

    It keeps the block's input (D), the results of products (queries, keys, values, the attention layer's output (D),
    gate and up (2 F), the feed-forward layer's output (D)), the result of attention itself (H K), one fp32
    log-sum-exp per head, and the results of both factors of each adapter.
    """
    q, kv = model.n_heads * model.head_width, model.kv_heads * model.head_width
    elements = 3 * model.d_model + 2 * q + 2 * kv + 2 * model.d_ff
    if lora is not None:
        elements += sum(lora.r + n_out for _, n_out in adapted_shapes(model, lora))
    return width * elements + 4 * model.n_heads


def adapter_bytes_per_token(model: ModelConfig, lora: LoraConfig, width: int) -> int:
    """Bytes per token that autograd keeps of the adapters of one block for its backward pass.

    It keeps what lies between the two factors; with dropout, the input that is left and one byte for each of its
    elements; with DoRA, the results of the matrix and of the adapter, which the rows' lengths multiply.
    """
    shapes = adapted_shapes(model, lora)
    n_in, n_out = (sum(shape[side] for shape in shapes) for side in (0, 1))
    return width * (lora.r * len(shapes) + 2 * n_out * lora.dora) + (width + 1) * n_in * (lora.dropout > 0)


def dora_bytes(model: ModelConfig, lora: LoraConfig, width: int) -> int:
    """Bytes that autograd keeps of the adapters of one block with DoRA, however many tokens there are.

    peft multiplies the factors with each other: it keeps a unit matrix, one factor and three vectors of rows.
    """
    shapes = adapted_shapes(model, lora) if lora.dora else []
    return width * sum(n_in * n_in + n_in * lora.r + 3 * n_out for n_in, n_out in shapes)


def activation_bytes(
    model: ModelConfig, engine: EngineConfig, each: Pass, updates: Updates = ALL_WEIGHTS
) -> dict[str, int]:
    """Peak bytes of the activations of one micro batch, by part."""
    width, tokens, lora = element_bytes(engine), each.tokens, updates.lora
    block = tokens * saved_bytes_per_token(model, width, each.sequence_length, each.masked)
    block += tokens * adapter_bytes_per_token(model, lora, width) + dora_bytes(model, lora, width)
    stream = width * tokens * model.d_model
    match model.activation_checkpointing:
        case Recompute.none:
            kept, at_work = model.n_layers * block, 0
        case Recompute.selective:
            kept = model.n_layers * tokens * selected_bytes_per_token(model, width, lora)
            at_work = block
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


def buffer_bytes(
    model: ModelConfig, engine: EngineConfig, partitioning: Partitioning, updates: Updates = ALL_WEIGHTS
) -> dict[str, int]:
    """Peak bytes of gathered parameters and of the buckets for communication."""
    width, zero_stage, trained = element_bytes(engine), engine.zero_stage, updates.trained(model)
    if zero_stage == 0:
        return {"buckets": 0}
    # A gradient that is larger than a bucket is sent alone. One bucket is filled while the other is being sent.
    largest_trained = max(size for size, _ in updates.trained_sizes(model))
    bucket = max(min(engine.reduce_bucket_elements, trained), largest_trained)
    found = {"buckets": 2 * width * bucket}
    if zero_stage == 3:
        largest = max(size for size, _ in updates.sizes(model))
        partitioned = updates.total(model) - persistent_elements(model, engine, updates)
        ahead = engine.prefetch_bucket_elements + max(block_elements(model, updates), largest)
        live = min(partitioned, kept_elements(model, engine, updates) + ahead)
        found["gathered parameters"] = width * live
    elif engine.precision is not Precision.fp32:
        found["gradients in fp32"] = 4 * -(-trained // partitioning.ranks_per_copy)
    return found


def memory_bytes(
    model: ModelConfig,
    engine: EngineConfig,
    partitioning: Partitioning,
    each: Pass,
    updates: Updates = ALL_WEIGHTS,
) -> tuple[dict[str, int], dict[str, int]]:
    """Peak bytes of one rank by part: on the device, and in host memory."""
    device: dict[str, int] = state_bytes(model, engine, partitioning, updates)
    host: dict[str, int] = {}
    if engine.offload_optimizer:
        for part in ("masters", "moments", "gradients", "moving average"):
            if part in device and (part != "gradients" or engine.zero_stage > 1):
                host[part] = device.pop(part)
    if engine.nvme_path is not None:  # gradients stay in memory, and so do four buffers of one sub-group
        del host["masters"], host["moments"]
        share = -(-updates.trained(model) // partitioning.ranks_per_copy)
        host["buffers for NVMe"] = 4 * 4 * min(NVME_SUB_GROUP_ELEMENTS, share)
    if engine.offload_params:
        host["parameters"] = device.pop("parameters")
    device |= buffer_bytes(model, engine, partitioning, updates)
    if engine.offload_optimizer and "gradients in fp32" in device:
        host["gradients in fp32"] = device.pop("gradients in fp32")
    device |= activation_bytes(model, engine, each, updates)
    # A save copies weights and moments to page-locked memory, which is kept for the next save.
    host["copy for saving"] = updates.saved_bytes * -(-updates.trained(model) // partitioning.n_ranks)
    device["context"] = int(CONTEXT_BYTES)
    device["fragmentation"] = int(FRAGMENTATION_FRAC * (sum(device.values()) - device["context"]))
    return device, host
