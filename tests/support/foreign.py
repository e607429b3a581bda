"""Writes one model as other programs would: the files are pickles, as theirs are.

`torch.save` and torch.distributed.checkpoint write their own formats here. The layouts of litgpt, Megatron and GPT-NeoX
are imitated from the sources of their converters: no checkpoint that these programs wrote was at hand.
"""

from __future__ import annotations

import argparse
import json
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from pretrain.config import ModelConfig


class AttnBackend(Enum):
    """Stands for the enums of Megatron in its arguments: a class that a reader need not have."""

    flash = 1


def _layers(weights: dict[str, Tensor], model: ModelConfig) -> list[dict[str, Tensor]]:
    """The weights of each block by their name in it."""
    prefixes = [f"model.layers.{layer}." for layer in range(model.n_layers)]
    return [{n.removeprefix(p): w for n, w in weights.items() if n.startswith(p)} for p in prefixes]


def _grouped(q: Tensor, k: Tensor, v: Tensor, model: ModelConfig) -> Tensor:
    """For each key head: its queries, the key, the value."""
    groups = [w.chunk(model.kv_heads) for w in (q, k, v)]
    return torch.cat([part for group in zip(*groups, strict=True) for part in group])


def write_hf_bin(folder: Path, weights: dict[str, Tensor], sharded: bool = False) -> None:
    """pytorch_model.bin, or two files with an index. config.json must be there already."""
    if not sharded:
        torch.save(weights, folder / "pytorch_model.bin")
        return
    names = sorted(weights)
    halves = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, members in halves.items():
        torch.save({name: torch.nn.Parameter(weights[name]) for name in members}, folder / file)
    places = {name: file for file, members in halves.items() for name in members}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))


def write_litgpt(folder: Path, weights: dict[str, Tensor], model: ModelConfig, old: bool = False) -> None:
    """lit_model.pth and model_config.yaml; `old` has the order of queries, keys and values before version 0.5."""
    state = {
        "transformer.wte.weight": weights["model.embed_tokens.weight"],
        "lm_head.weight": weights["lm_head.weight"],
        "transformer.ln_f.weight": weights["model.norm.weight"],
    }
    for number, layer in enumerate(_layers(weights, model)):
        prefix = f"transformer.h.{number}."
        q, k, v = (layer[f"self_attn.{part}_proj.weight"] for part in "qkv")
        state[f"{prefix}attn.{'attn' if old else 'qkv'}.weight"] = (
            _grouped(q, k, v, model) if old else torch.cat([q, k, v])
        )
        state |= {
            f"{prefix}norm_1.weight": layer["input_layernorm.weight"],
            f"{prefix}norm_2.weight": layer["post_attention_layernorm.weight"],
            f"{prefix}attn.proj.weight": layer["self_attn.o_proj.weight"],
            f"{prefix}mlp.fc_1.weight": layer["mlp.gate_proj.weight"],
            f"{prefix}mlp.fc_2.weight": layer["mlp.up_proj.weight"],
            f"{prefix}mlp.proj.weight": layer["mlp.down_proj.weight"],
        }
    torch.save({"model": state}, folder / "lit_model.pth")
    config = {
        "name": "x", "block_size": 64, "n_layer": model.n_layers, "n_embd": model.d_model, "n_head": model.n_heads,
        "n_query_groups": model.kv_heads, "head_size": model.head_width, "intermediate_size": model.d_ff,
        "rope_base": int(model.rope_theta), "norm_eps": model.norm_eps, "norm_class_name": "RMSNorm", "bias": False,
        "mlp_class_name": "LLaMAMLP", "rotary_percentage": 1.0, "parallel_residual": False, "norm_qk": False,
    }  # fmt: skip
    (folder / "model_config.yaml").write_text(yaml.safe_dump(config))


def write_megatron(
    folder: Path, weights: dict[str, Tensor], model: ModelConfig, ranks: int = 2, **arguments: Any
) -> None:
    """iter_0000010/mp_rank_XX/model_optim_rng.pt of Megatron Core with transformer engine, one per rank."""
    given = dict(  # noqa: C408
        num_layers=model.n_layers, hidden_size=model.d_model, ffn_hidden_size=model.d_ff, rotary_base=model.rope_theta,
        num_attention_heads=model.n_heads, group_query_attention=True, num_query_groups=model.kv_heads,
        kv_channels=model.head_width, max_position_embeddings=64, norm_epsilon=model.norm_eps, swiglu=True,
        normalization="RMSNorm", position_embedding_type="rope", rotary_percent=1.0, add_bias_linear=False,
        untie_embeddings_and_output_weights=True, attention_backend=AttnBackend.flash, params_dtype=torch.float32,
        add_qkv_bias=model.attention_bias, tensor_model_parallel_size=ranks,
    )  # fmt: skip
    args = argparse.Namespace(**(given | arguments))
    (folder / "latest_checkpointed_iteration.txt").write_text("10")
    for rank in range(ranks):

        def mine(weight: Tensor, dim: int = 0, rank: int = rank) -> Tensor:
            return weight.chunk(ranks, dim)[rank].clone()

        state: dict[str, Any] = {
            "embedding.word_embeddings.weight": mine(weights["model.embed_tokens.weight"]),
            "output_layer.weight": mine(weights["lm_head.weight"]),
            "decoder.final_layernorm.weight": weights["model.norm.weight"],
            "decoder.final_layernorm._extra_state": None,
        }
        for number, layer in enumerate(_layers(weights, model)):
            prefix = f"decoder.layers.{number}."
            for kind in ("weight", "bias") if model.attention_bias else ("weight",):
                q, k, v = (layer[f"self_attn.{part}_proj.{kind}"] for part in "qkv")
                state[f"{prefix}self_attention.linear_qkv.{kind}"] = mine(_grouped(q, k, v, model))
            gate, up = mine(layer["mlp.gate_proj.weight"]), mine(layer["mlp.up_proj.weight"])
            state |= {
                f"{prefix}self_attention.linear_qkv.layer_norm_weight": layer["input_layernorm.weight"],
                f"{prefix}self_attention.linear_proj.weight": mine(layer["self_attn.o_proj.weight"], 1),
                f"{prefix}mlp.linear_fc1.layer_norm_weight": layer["post_attention_layernorm.weight"],
                f"{prefix}mlp.linear_fc1.weight": torch.cat([gate, up]),
                f"{prefix}mlp.linear_fc2.weight": mine(layer["mlp.down_proj.weight"], 1),
            }
        where = folder / "iter_0000010" / f"mp_rank_{rank:02d}"
        where.mkdir(parents=True)
        saved = {"args": args, "checkpoint_version": 3.0, "iteration": 10, "model": state}
        torch.save(saved, where / "model_optim_rng.pt")


def write_neox(folder: Path, weights: dict[str, Tensor], model: ModelConfig, ranks: int = 2) -> None:
    """global_step10/layer_XX-model_YY-model_states.pt of GPT-NeoX in its Llama configuration, and configs/."""
    where = folder / "global_step10"
    (where / "configs").mkdir(parents=True)
    (folder / "latest").write_text("global_step10")
    config = {
        "num-layers": model.n_layers, "hidden-size": model.d_model, "num-attention-heads": model.n_heads,
        "num_kv_heads": model.kv_heads, "intermediate-size": model.d_ff, "rotary-emb-base": int(model.rope_theta),
        "rms-norm-epsilon": model.norm_eps, "norm": "rmsnorm", "pos-emb": "rotary", "rotary_pct": 1,
        "no-weight-tying": True, "use_bias_in_attn_linear": False, "activation": "silu", "mlp_type": "llama",
        "max-position-embeddings": 64,
    }  # fmt: skip
    (where / "configs" / "model.yml").write_text(yaml.safe_dump(config))
    width = model.kv_heads * model.head_width // model.n_heads
    for rank in range(ranks):

        def save(number: int, state: dict[str, Tensor], rank: int = rank) -> None:
            torch.save(state, where / f"layer_{number:02d}-model_{rank:02d}-model_states.pt")

        def mine(weight: Tensor, dim: int = 0, rank: int = rank) -> Tensor:
            return weight.chunk(ranks, dim)[rank].clone()

        save(0, {"word_embeddings.weight": mine(weights["model.embed_tokens.weight"])})
        for number, layer in enumerate(_layers(weights, model)):
            widths = {"q": model.head_width, "k": width, "v": width}
            parts = [layer[f"self_attn.{part}_proj.weight"].split(size) for part, size in widths.items()]
            fused = torch.cat([part for head in zip(*parts, strict=True) for part in head])
            save(
                number + 2,
                {
                    "input_layernorm.scale": layer["input_layernorm.weight"],
                    "post_attention_layernorm.scale": layer["post_attention_layernorm.weight"],
                    "attention.query_key_value.weight": mine(fused),
                    "attention.dense.weight": mine(layer["self_attn.o_proj.weight"], 1),
                    "attention.rotary_emb.inv_freq": torch.ones(4),
                    "mlp.w1.weight": mine(layer["mlp.gate_proj.weight"]),
                    "mlp.w3.weight": mine(layer["mlp.up_proj.weight"]),
                    "mlp.w2.weight": mine(layer["mlp.down_proj.weight"], 1),
                },
            )
        save(model.n_layers + 3, {"norm.scale": weights["model.norm.weight"]})
        save(model.n_layers + 4, {"final_linear.weight": mine(weights["lm_head.weight"])})
