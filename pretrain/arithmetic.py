"""Counts a decoder's parameters and training FLOPs from its configuration, and the best time between saves.

The trainer and the planner use them, the planner without importing torch. Tests compare the
parameter counts with `pretrain.model.decoder.Decoder`, and the FLOPs with those that torch counts in it.

>>> small = ModelConfig(n_layers=2, d_model=64, n_heads=2, n_kv_heads=1, d_ff=160, vocab_size=512)
>>> block_parameters(small)  # attention 12,288, feed-forward 30,720, two norms 128
43136
>>> count_parameters(small)  # two blocks, embedding and head of 32,768 each, the last norm of 64
151872
"""

from __future__ import annotations

import math

from pretrain.config import LoraConfig, ModelConfig

HOURS_BETWEEN_FAILURES_PER_RANK = 50_000.0
"""The rate that the Llama 3 paper (2024) reports: 419 unexpected interruptions in 54 days on 16,384 GPUs."""


def parameter_sizes(model: ModelConfig) -> list[tuple[int, int]]:
    """(elements, count) for each kind of parameter of the decoder; a tied matrix counts once.

    `model.vocab_size` must be set. The first entry is the embedding; if the output head is not tied, its count is 2.
    The head of a classifier is an entry of its own, the last one.
    """
    assert model.vocab_size is not None
    width, depth = model.d_model, model.n_layers
    q, kv = model.n_heads * model.head_width, model.kv_heads * model.head_width
    sizes = [
        (
            model.vocab_size * width,
            1 if model.tie_embeddings or model.classes else 2,
        ),  # embedding, output head
        (width * q, 2 * depth),  # queries, output of attention
        (width * kv, 2 * depth),  # keys, values
        (width * model.d_ff, 3 * depth),  # gate, up, down
        (width, 2 * depth + 1),  # norms: two in each block, one before the head
    ]
    if model.qk_norm:
        sizes.append((model.head_width, 2 * depth))
    if model.attention_bias:
        sizes += [(q, depth), (kv, 2 * depth)]
    if model.classes:
        sizes.append((len(model.classes) * width, 1))
    return sizes


def count_parameters(model: ModelConfig) -> int:
    """The number of trainable values; a tied matrix counts once."""
    return sum(size * count for size, count in parameter_sizes(model))


def non_embedding_parameters(model: ModelConfig) -> int:
    """The parameters without token embedding and output head, as counted in scaling laws (Kaplan et al., 2020)."""
    _, *others = parameter_sizes(model)
    return sum(size * count for size, count in others) - len(model.classes) * model.d_model


def block_parameters(model: ModelConfig) -> int:
    """The parameters of one transformer block: all but the embedding, the head and the norm before the head."""
    return (non_embedding_parameters(model) - model.d_model) // model.n_layers


def adapted_shapes(model: ModelConfig, lora: LoraConfig) -> list[tuple[int, int]]:
    """(columns, rows) of the matrices of one block that get an adapter; none without adapters."""
    q, kv = model.n_heads * model.head_width, model.kv_heads * model.head_width
    width, inner = model.d_model, model.d_ff
    shapes = {"q": (width, q), "k": (width, kv), "v": (width, kv), "output": (q, width)}
    shapes |= {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}
    return [shape for name, shape in shapes.items() if lora.r and name in lora.targets]


def adapter_sizes(model: ModelConfig, lora: LoraConfig) -> list[tuple[int, int]]:
    """(elements, count) for each kind of parameter of adapters: two factors per matrix and, with DoRA, its rows'
    lengths."""
    shapes, depth = adapted_shapes(model, lora), model.n_layers
    factors = [(lora.r * side, depth) for shape in shapes for side in shape]
    return factors + ([(n_out, depth) for _, n_out in shapes] if lora.dora else [])


def adapter_parameters(model: ModelConfig, lora: LoraConfig) -> int:
    """The number of values in all adapters."""
    return sum(size * count for size, count in adapter_sizes(model, lora))


def flops_per_token(model: ModelConfig, sequence_length: int, lora: LoraConfig | None = None) -> float:
    """Floating-point operations per token of a forward and a backward pass, without recomputation.

    6 x (parameters in matrix products, the head but not the embedding look-up) + 12 L H K T: PaLM
    (Chowdhery et al., 2022), appendix B. As in that paper, attention counts as if every token saw all T tokens:
    nothing is deducted for the causal mask or the document mask. Norms, rotary positions and softmax are left out.

    Frozen weights under adapters have no gradient, so their products count 4 instead of 6, and the adapters are added.
    The head of a classifier is trained beside them.
    """
    if lora is not None and lora.r:
        frozen = matmul_flops_per_token(model) * 4 / 6 + 2.0 * len(model.classes) * model.d_model
        return (
            frozen + 6.0 * adapter_parameters(model, lora) + attention_flops_per_token(model, sequence_length)
        )
    return matmul_flops_per_token(model) + attention_flops_per_token(model, sequence_length)


def matmul_flops_per_token(model: ModelConfig) -> float:
    """The part of `flops_per_token` that is spent in products with weights."""
    assert model.vocab_size is not None
    q, kv = model.n_heads * model.head_width, model.kv_heads * model.head_width
    block = model.d_model * (2 * q + 2 * kv + 3 * model.d_ff)
    return 6.0 * (model.n_layers * block + (len(model.classes) or model.vocab_size) * model.d_model)


def attention_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """The part of `flops_per_token` that is spent in attention, which grows with the sequence length."""
    return 12.0 * model.n_layers * model.n_heads * model.head_width * sequence_length


def between_failures_s(n_ranks: int, mtbf_hours: float | None) -> float:
    """Mean time in seconds between failures of the whole job: `mtbf_hours`, or an estimate from the number of ranks."""
    hours = mtbf_hours if mtbf_hours is not None else HOURS_BETWEEN_FAILURES_PER_RANK / n_ranks
    return hours * 3600


def advised_interval_s(save_cost_s: float, mtbf_s: float) -> float:
    """Seconds between saves that lose the least time: sqrt(2 x cost of a save x mean time between failures).

    The formula is from Young, "A first order approximation to the optimum checkpoint interval", 1974. `save_cost_s` is
    the time that training pauses for a save.
    """
    return math.sqrt(2 * save_cost_s * mtbf_s)
