"""What other programs call the parts of a Llama-shaped model, and how they lay out its matrices.

`settings_of` reads their configuration as keys of our models, and `renamed` gives their weights the names and shapes
that Hugging Face's classes have. What is no Llama-shaped model is refused with the key that says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pretrain.config import ModelConfig, RopeScalingConfig, RopeType
from pretrain.convert.foreign.archive import joined
from pretrain.convert.foreign.layouts import Found, parts_of
from pretrain.convert.foreign.pickled import PickledError
from pretrain.convert.hugging_face_import import model_of
from pretrain.convert.streamed import Weight, weight_of

_KEYS: dict[str, dict[str, tuple[str, ...]]] = {
    "litgpt": {
        "n_layers": ("n_layer",),
        "d_model": ("n_embd",),
        "n_heads": ("n_head",),
        "n_kv_heads": ("n_query_groups",),
        "d_head": ("head_size",),
        "d_ff": ("intermediate_size",),
        "rope_theta": ("rope_base",),
        "norm_eps": ("norm_eps",),
        "qk_norm": ("norm_qk",),
        "attention_bias": ("attn_bias",),
    },
    "megatron": {
        "n_layers": ("num_layers",),
        "d_model": ("hidden_size",),
        "n_heads": ("num_attention_heads",),
        "d_head": ("kv_channels",),
        "d_ff": ("ffn_hidden_size",),
        "rope_theta": ("rotary_base",),
        "norm_eps": ("norm_epsilon", "layernorm_epsilon"),
        "qk_norm": ("qk_layernorm",),
        "attention_bias": ("add_qkv_bias",),
    },
    "neox": {
        "n_layers": ("num_layers",),
        "d_model": ("hidden_size",),
        "n_heads": ("num_attention_heads",),
        "n_kv_heads": ("num_kv_heads",),
        "d_ff": ("intermediate_size",),
        "rope_theta": ("rotary_emb_base",),
        "norm_eps": ("rms_norm_epsilon",),
    },
}
"""Where each key of our models stands in the configurations of others; the first that is there counts."""
_LENGTH = ("block_size", "max_position_embeddings", "seq_length")
_REQUIRED: dict[str, dict[str, tuple[Any, ...]]] = {
    "litgpt": {
        "norm_class_name": ("RMSNorm",),
        "mlp_class_name": ("LLaMAMLP",),
        "rotary_percentage": (1, 1.0),
        "parallel_residual": (False,),
        "scale_embeddings": (False,),
        "bias": (False,),
        "lm_head_bias": (False,),
        "sliding_window_size": (),
        "final_logit_softcapping": (),
        "attention_logit_softcapping": (),
    },
    "megatron": {
        "position_embedding_type": ("rope",),
        "normalization": ("RMSNorm",),
        "swiglu": (True,),
        "add_bias_linear": (False,),
        "rotary_percent": (1, 1.0),
        "rotary_interleaved": (False,),
        "rotary_seq_len_interpolation_factor": (),
        "num_experts": (),
    },
    "neox": {
        "pos_emb": ("rotary",),
        "norm": ("rmsnorm",),
        "activation": ("silu", "swiglu"),
        "mlp_type": ("llama",),
        "rotary_pct": (1, 1.0),
        "gpt_j_residual": (False,),
        "use_bias_in_attn_linear": (False,),
    },
}
"""Values that a key must have, if it is there and not null."""


def settings_of(found: Found) -> tuple[dict[str, Any], int | None]:
    """Keys of our models as the checkpoint's configuration has them, and the length in tokens if it states one."""
    raw, path = found.config, Path("its configuration")
    if found.kind not in _KEYS:
        if not raw:
            return {}, None
        model, length = model_of(raw, path)
        return {name: getattr(model, name) for name in ModelConfig.__slots__}, length
    for key, allowed in _REQUIRED[found.kind].items():
        if raw.get(key) is not None and raw[key] not in allowed:
            raise PickledError(
                f"its configuration has {key}={raw[key]}, which this program's decoder does not have"
            )
    settings: dict[str, Any] = {}
    for ours, names in _KEYS[found.kind].items():
        value = next((raw[name] for name in names if raw.get(name) is not None), None)
        if isinstance(value, bool | int | float):
            settings[ours] = float(value) if ours in ("rope_theta", "norm_eps") else value
    if raw:
        settings |= _special(found.kind, raw)
    stated = next((raw[key] for key in _LENGTH if type(raw.get(key)) is int), None)
    return settings, stated


def _special(kind: str, raw: dict[str, Any]) -> dict[str, Any]:
    """The settings that are more than another name."""
    settings: dict[str, Any] = {}
    scaling = raw.get("rope_adjustments") if kind == "litgpt" else None
    if isinstance(scaling, dict):
        names = {
            "factor": "factor",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
        }
        settings["rope_scaling"] = _llama3(
            scaling, {**names, "original_max_position_embeddings": "original_max_seq_len"}
        )
    if kind == "megatron":
        settings["tie_embeddings"] = raw.get("untie_embeddings_and_output_weights") is not True
        if raw.get("group_query_attention") is True and type(raw.get("num_query_groups")) is int:
            settings["n_kv_heads"] = raw["num_query_groups"]
        if raw.get("use_rope_scaling") is True:  # Megatron knows that of Llama 3.1 alone
            values = {"factor": raw.get("rope_scaling_factor") or 8.0, "original": 8192}
            settings["rope_scaling"] = _llama3(
                values, {"factor": "factor", "original_max_position_embeddings": "original"}
            )
    if kind == "neox":
        settings["tie_embeddings"] = raw.get("no_weight_tying") is not True
    return settings


def _llama3(values: dict[str, Any], names: dict[str, str]) -> RopeScalingConfig:
    given = {ours: values.get(theirs) for ours, theirs in names.items()}
    if not all(isinstance(value, int | float) for value in given.values()):
        raise PickledError(
            f"its configuration has scaled rotary positions {values}, which are not those of Llama 3.1"
        )
    return RopeScalingConfig(rope_type=RopeType.llama3, **given)  # type: ignore[arg-type]


def renamed(found: Found, model: ModelConfig) -> dict[str, Weight]:
    """The weights under the names of Hugging Face's classes. Raises PickledError where one has no such name."""
    match found.kind:
        case "litgpt":
            return _each(_of_litgpt, found.weights, model)
        case "megatron":
            return _each(_of_megatron, parts_of(found.weights), model)
        case "neox":
            return _each(_of_neox, parts_of(found.weights), model)
        case _:
            titan = without_prefix(found.weights, "tok_embeddings.weight")
            if titan:
                return _each(_of_titan, titan, model)
            hugging_face = without_prefix(found.weights, "model.embed_tokens.weight")
            if hugging_face:
                return hugging_face
    some = ", ".join(sorted(found.weights)[:3])
    raise PickledError(
        f"it has no model.embed_tokens.weight, so it is no model of Hugging Face's Llama kind; it has {some}"
    )


def without_prefix(weights: dict[str, Weight], last: str) -> dict[str, Weight]:
    """The model among the weights, whose names may begin with those of modules around it. `last` is its embedding.

    The result is empty if there is no such embedding.
    """
    prefixes = [name.removesuffix(last) for name in weights if name.endswith(last)]
    prefixes = [prefix for prefix in prefixes if not prefix or prefix.endswith(".")]
    if not prefixes:
        return {}
    prefix = min(prefixes, key=len)
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def vocabulary(found: Found) -> int | None:
    """Rows of the embedding, with what pads it."""
    ends = (
        "embed_tokens.weight",
        "tok_embeddings.weight",
        "transformer.wte.weight",
        "word_embeddings.weight",
    )
    rows: dict[str, int] = {}
    for name, weight in found.weights.items():
        plain_name = name.rpartition("@")[0] or name
        if plain_name.endswith(ends) and len(weight.shape) == 2:
            rows[plain_name] = rows.get(plain_name, 0) + weight.shape[0]
    return rows[min(rows, key=len)] if rows else None


def _each(
    convert: Callable[..., dict[str, Weight]], weights: dict[str, Any], model: ModelConfig
) -> dict[str, Weight]:
    result: dict[str, Weight] = {}
    for name, weight in weights.items():
        result |= convert(name, weight, model)
    return result


def _of_titan(name: str, weight: Weight, model: ModelConfig) -> dict[str, Weight]:
    """The names of Meta's Llama and of torchtitan. There, rotary positions pair neighbors and not halves of a head."""
    around = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    inside = {
        "attention.wq.weight": "self_attn.q_proj.weight",
        "attention.wk.weight": "self_attn.k_proj.weight",
        "attention.wv.weight": "self_attn.v_proj.weight",
        "attention.wo.weight": "self_attn.o_proj.weight",
        "attention_norm.weight": "input_layernorm.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
        "feed_forward.w1.weight": "mlp.gate_proj.weight",
        "feed_forward.w2.weight": "mlp.down_proj.weight",
        "feed_forward.w3.weight": "mlp.up_proj.weight",
    }
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if match is None:  # other state, such as the optimizer's, may lie beside the model
        return {around[name]: weight} if name in around else {}
    theirs = f"model.layers.{match[1]}.{_known(inside, match[2], name)}"
    if match[2] not in ("attention.wq.weight", "attention.wk.weight"):
        return {theirs: weight}
    if len(weight.shape) != 2 or weight.shape[0] % model.head_width:
        raise PickledError(
            f"its {name} has the shape {list(weight.shape)}, which has no heads of model.d_head={model.head_width}"
        )
    pairs = (weight.shape[0] // model.head_width, model.head_width // 2, 2)
    return {theirs: _part(weight, weight.shape[0], lambda w: w.unflatten(0, pairs).transpose(1, 2))}


def _of_litgpt(name: str, weight: Weight, model: ModelConfig) -> dict[str, Weight]:
    around = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head"}
    inside = {
        "norm_1": "input_layernorm",
        "norm_2": "post_attention_layernorm",
        "attn.proj": "self_attn.o_proj",
        "attn.norm_q": "self_attn.q_norm",
        "attn.norm_k": "self_attn.k_norm",
        "mlp.fc_1": "mlp.gate_proj",
        "mlp.fc_2": "mlp.up_proj",
        "mlp.proj": "mlp.down_proj",
    }
    match = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None:
        module, _, kind = name.rpartition(".")
        return {f"{_known(around, module, name)}.{kind}": weight}
    layer, module, kind = match.groups()
    if module in ("attn.qkv", "attn.attn"):  # before version 0.5 it was `attn.attn`, ordered by groups
        split = _split_stacked if module == "attn.qkv" else _split_grouped
        return _heads(int(layer), kind, split(name, weight, model))
    return {f"model.layers.{layer}.{_known(inside, module, name)}.{kind}": weight}


def _of_megatron(name: str, parts: list[Weight], model: ModelConfig) -> dict[str, Weight]:
    if name.endswith("._extra_state"):
        return {}
    around = {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "output_layer.weight": "lm_head.weight",
        "decoder.final_layernorm.weight": "model.norm.weight",
    }
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if match is None:
        theirs = _known(around, name, name)
        return {theirs: parts[0] if "norm" in name else joined(parts)}
    layer, inner = match.groups()
    norms = {
        "input_layernorm.weight": "input_layernorm.weight",
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
        "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
        "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    }
    prefix = f"model.layers.{layer}."
    match inner:
        case "self_attention.linear_qkv.weight" | "self_attention.linear_qkv.bias":
            kind = inner.rpartition(".")[2]
            return _heads(int(layer), kind, _split_grouped(name, joined(parts), model))
        case "self_attention.linear_proj.weight":
            return {f"{prefix}self_attn.o_proj.weight": joined(parts, 1)}
        case "mlp.linear_fc2.weight":
            return {f"{prefix}mlp.down_proj.weight": joined(parts, 1)}
        case "mlp.linear_fc1.weight":  # each rank has its rows of the gate, then its rows of the other matrix
            halves = [_halves(name, part) for part in parts]
            up = joined([half[1] for half in halves])
            return {
                f"{prefix}mlp.gate_proj.weight": joined([half[0] for half in halves]),
                f"{prefix}mlp.up_proj.weight": up,
            }
    return {prefix + _known(norms, inner, name): parts[0]}


def _of_neox(full: str, parts: list[Weight], model: ModelConfig) -> dict[str, Weight]:
    """Names are those of a layer of the pipeline: 0 is the embedding, and the first block is 2."""
    number, _, name = full.partition(".")
    around = {
        "word_embeddings.weight": "model.embed_tokens.weight",
        "norm.scale": "model.norm.weight",
        "final_linear.weight": "lm_head.weight",
    }
    inside = {
        "input_layernorm.scale": ("input_layernorm.weight", None),
        "post_attention_layernorm.scale": ("post_attention_layernorm.weight", None),
        "attention.dense.weight": ("self_attn.o_proj.weight", 1),
        "mlp.w1.weight": ("mlp.gate_proj.weight", 0),
        "mlp.w3.weight": ("mlp.up_proj.weight", 0),
        "mlp.w2.weight": ("mlp.down_proj.weight", 1),
    }
    if name in around:
        return {around[name]: parts[0] if name == "norm.scale" else joined(parts)}
    if name.endswith("rotary_emb.inv_freq"):
        return {}
    prefix = f"model.layers.{int(number) - 2}."
    if name == "attention.query_key_value.weight":
        return _heads(int(number) - 2, "weight", _split_by_head(full, joined(parts), model))
    theirs, dim = _known(inside, name, full)
    return {prefix + theirs: parts[0] if dim is None else joined(parts, dim)}


def _known(names: dict[str, Any], name: str, full: str) -> Any:
    if name not in names:
        raise PickledError(f"it has the weight {full!r}, which a Llama-shaped model does not have")
    return names[name]


def _heads(layer: int, kind: str, parts: tuple[Weight, Weight, Weight]) -> dict[str, Weight]:
    return {f"model.layers.{layer}.self_attn.{p}_proj.{kind}": w for p, w in zip("qkv", parts, strict=True)}


def _rows(name: str, weight: Weight, model: ModelConfig) -> tuple[int, int, int]:
    """Query heads, key heads and the width of a head, which must account for all rows of a fused matrix."""
    heads, groups, width = model.n_heads, model.kv_heads, model.head_width
    if not weight.shape or weight.shape[0] != (heads + 2 * groups) * width:
        raise PickledError(
            f"its {name} has the shape {list(weight.shape)}, but model.n_heads={heads}, model.n_kv_heads={groups} and "
            f"model.d_head={width} need {(heads + 2 * groups) * width} rows"
        )
    return heads, groups, width


def _part(weight: Weight, rows: int, choose: Callable[[torch.Tensor], torch.Tensor]) -> Weight:
    shape = (rows, *weight.shape[1:])
    return weight_of(shape, weight.dtype, lambda: choose(weight.whole()).reshape(shape))


def _halves(name: str, weight: Weight) -> tuple[Weight, Weight]:
    if not weight.shape or weight.shape[0] % 2:
        raise PickledError(f"its {name} has the shape {list(weight.shape)}, which has no halves")
    half = weight.shape[0] // 2
    return _part(weight, half, lambda w: w[:half]), _part(weight, half, lambda w: w[half:])


def _split_stacked(name: str, weight: Weight, model: ModelConfig) -> tuple[Weight, Weight, Weight]:
    """All queries, then all keys, then all values."""
    heads, groups, width = _rows(name, weight, model)
    q, kv = heads * width, groups * width
    return (
        _part(weight, q, lambda w: w[:q]),
        _part(weight, kv, lambda w: w[q : q + kv]),
        _part(weight, kv, lambda w: w[q + kv :]),
    )


def _split_grouped(name: str, weight: Weight, model: ModelConfig) -> tuple[Weight, Weight, Weight]:
    """For each key head: the queries that attend with it, the key, the value."""
    heads, groups, width = _rows(name, weight, model)
    q = heads // groups * width

    def of_groups(w: torch.Tensor) -> torch.Tensor:
        return w.unflatten(0, (groups, q + 2 * width))

    return (
        _part(weight, heads * width, lambda w: of_groups(w)[:, :q]),
        _part(weight, groups * width, lambda w: of_groups(w)[:, q : q + width]),
        _part(weight, groups * width, lambda w: of_groups(w)[:, q + width :]),
    )


def _split_by_head(name: str, weight: Weight, model: ModelConfig) -> tuple[Weight, Weight, Weight]:
    """For each query head: the query, and its share of a key and a value, which several heads make up together."""
    heads, groups, width = _rows(name, weight, model)
    share = groups * width // heads
    if share * heads != groups * width:
        raise PickledError(f"its {name} cannot be cut into model.n_heads={heads} parts")

    def of_heads(w: torch.Tensor) -> torch.Tensor:
        return w.unflatten(0, (heads, width + 2 * share))

    return (
        _part(weight, heads * width, lambda w: of_heads(w)[:, :width]),
        _part(weight, groups * width, lambda w: of_heads(w)[:, width : width + share]),
        _part(weight, groups * width, lambda w: of_heads(w)[:, width + share :]),
    )
