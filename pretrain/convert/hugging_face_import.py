"""Imports a Hugging Face model as a run folder, published only if it gives the logits that `transformers` computes.

Read are LlamaForCausalLM (and what shares its form: SmolLM, TinyLlama), MistralForCausalLM without a sliding window,
Qwen2ForCausalLM and Qwen3ForCausalLM, with weights in safetensors. What this project's decoder does not have, such as
a sliding window, is refused by name: a model without it would be another model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from pretrain.config import (
    ModelConfig,
    Precision,
    RopeScalingConfig,
    RopeType,
    TrainConfig,
    load_config,
    to_dict,
)
from pretrain.convert.hugging_face import (
    INDEX_NAME,
    WEIGHTS_NAME,
    Parity,
    compare_logits,
    convert_tokenizer,
    hugging_face_names,
    is_large,
    require,
)
from pretrain.convert.streamed import DTYPES, Weight, equal, open_safetensors
from pretrain.convert.weights_only import save_weights
from pretrain.corpus.chat_template import template_in
from pretrain.corpus.tokenizer import HUGGING_FACE_NAME, MAX_MODEL_BYTES, SENTENCEPIECE_NAME, Tokenizer
from pretrain.corpus.tokenizer_trial import try_tokenizer
from pretrain.errors import ConfigError, RunError
from pretrain.files import published_together, read_capped
from pretrain.model.decoder import Decoder
from pretrain.model.rotary import yarn_factor
from pretrain.stored import is_file_name
from pretrain.trained import TrainedModel, open_trained

_FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "Qwen2ForCausalLM": {"attention_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": True},
    "SeedOssForCausalLM": {"attention_bias": True},
}
"""The classes that can be imported, and what each has that is a key of our models."""
_MAX_JSON_BYTES = 64 << 20
_REQUIRED = {
    "hidden_act": ("silu",),
    "attention_out_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1, 1.0),
}
"""Values that a key of config.json must have, if it is there and not null."""
_SHAPE = {
    "n_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_head": "head_dim",
    "d_ff": "intermediate_size",
    "vocab_size": "vocab_size",
}
_OPTIONAL = ("n_kv_heads", "d_head")
_ORIGINAL = "original_max_position_embeddings"
_ROPE_KEYS: dict[Any, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"},
    "yarn": {
        "factor",
        _ORIGINAL,
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}
"""The types of rotary positions that can be imported, and the keys that each may have."""
_MAX_PIECE_CHARS = 256  # a conversion looks at all ways to cut a piece; those of this program have at most 16
_BUFFER = "rotary_emb.inv_freq"  # older versions of transformers saved it; it follows from the configuration


def import_model(folder: Path, tokenizer: Tokenizer, output: Path) -> tuple[ModelConfig, Parity]:
    """Write the run folder `output` with the weights in `folder` as the checkpoint of step 0.

    A model that is larger than memory is neither copied nor compared as a whole. Raises ConfigError for a model that
    cannot be imported, and RunError where its logits differ.
    """
    raw = _read_json(folder / "config.json")
    model, sequence_length = model_of(raw, folder / "config.json")
    if not isinstance(raw.get("model_type"), str):
        raise ConfigError(
            f"{folder}/config.json has no model_type, by which transformers tells what to compare with"
        )
    weights, template = _weights(folder, model), template_in(folder)
    untrained = _untrained(model, sequence_length, tokenizer, template)
    if is_large(untrained):
        require("accelerate", "export")
    with published_together(output) as temporary:
        save_weights(temporary, untrained, weights)
        with open_trained(temporary) as imported:
            parity = compare_logits(imported, folder, torch.float32)
        if not parity.holds:
            raise RunError(
                f"the imported model differs from {folder}: logits by up to {parity.max_difference:.3g} (allowed "
                f"{parity.tolerance:.3g}); {output} was not written"
            )
    return model, parity


def tokenizer_of_export(folder: Path) -> Tokenizer | None:
    """The sentencepiece model of a folder that this program has exported; None for any other folder.

    It is the tokenizer of the corpora that the exported model has seen; the tokenizer.json beside it, which gives the
    same tokens, is another file. It is told by that file, which must be what an export makes of it.
    """
    path, converted = folder / SENTENCEPIECE_NAME, folder / HUGGING_FACE_NAME
    if not (path.is_file() and converted.is_file()):
        return None
    try:
        content = read_capped(path, MAX_MODEL_BYTES)
        try_tokenizer(content, path)
        tokenizer = Tokenizer.from_content(content, path)
        if max(len(tokenizer.piece(number)) for number in range(tokenizer.vocab_size)) > _MAX_PIECE_CHARS:
            return None
        expected = json.loads(convert_tokenizer(tokenizer).to_str())
    except Exception:  # a file of this name may be anything, and tokenizers raises plain exceptions
        return None
    return tokenizer if expected == _read_json(converted) else None


def model_of(raw: dict[str, Any], path: Path) -> tuple[ModelConfig, int]:
    """The decoder that a config.json describes, and the length it was trained for in tokens. Raises ConfigError."""
    named = raw.get("architectures")
    family = named[0] if isinstance(named, list) and len(named) == 1 else named
    if family not in _FAMILIES:
        raise ConfigError(f"{path} has architectures={named}; known are {', '.join(_FAMILIES)}")
    for key, allowed in _REQUIRED.items():
        if raw.get(key) is not None and raw[key] not in allowed:
            raise ConfigError(f"{path} has {key}={raw[key]}, which this program's decoder does not have")
    if raw.get("attention_bias") not in (None, family == "SeedOssForCausalLM"):
        raise ConfigError(
            f"{path} has attention_bias={raw['attention_bias']} for {family}, but this program's decoder has biases of "
            "queries, keys and values only, and only as Qwen2 has them"
        )
    length, window = _size(raw, "max_position_embeddings", path), raw.get("sliding_window")
    if (
        window is not None
        and raw.get("use_sliding_window", True)
        and _size(raw, "sliding_window", path) < length
    ):
        raise ConfigError(f"{path} has sliding_window={window}, which this program's decoder does not have")
    shape: dict[str, Any] = {
        ours: _size(raw, theirs, path)
        for ours, theirs in _SHAPE.items()
        if ours not in _OPTIONAL or raw.get(theirs) is not None
    }
    config = ModelConfig(
        **shape,
        **_rotary(raw, length, path),
        norm_eps=_number(raw, "rms_norm_eps", 1e-6, path),
        **_FAMILIES[family],
        tie_embeddings=raw.get("tie_word_embeddings") is True,
    )
    return config, length


def model_words(model: ModelConfig) -> list[str]:
    """The options of `launch/train.py` that give this model: the values that are not those of conf/model/tiny.yaml."""
    words = [f"model.{key}={getattr(model, key)}" for key in _SHAPE if getattr(model, key) is not None]
    words += [f"model.{key}={getattr(model, key)}" for key in ("rope_theta", "norm_eps")]
    words += [
        f"model.{key}=true" for key in ("qk_norm", "attention_bias", "tie_embeddings") if getattr(model, key)
    ]
    unscaled = to_dict(RopeScalingConfig())
    scaled = {key: value for key, value in to_dict(model.rope_scaling).items() if value != unscaled[key]}
    return words + [f"model.rope_scaling.{key}={str(value).lower()}" for key, value in scaled.items()]


def _size(raw: dict[str, Any], key: str, path: Path) -> int:
    value = raw.get(key)
    if type(value) is not int or not 0 < value < 1 << 24:
        raise ConfigError(f"{path} has {key}={value}, where a positive whole number is needed")
    return value


def _rotary(raw: dict[str, Any], length: int, path: Path) -> dict[str, Any]:
    """The base and the scaling of rotary positions. Raises ConfigError for what this program does not compute."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise ConfigError(
            f"{path} has rotary positions of type {kind!r}, which this program's decoder does not have; known are "
            f"{', '.join(_ROPE_KEYS)} (those of 'dynamic' and 'longrope' depend on the length of the text at hand)"
        )
    rope = {key: value for key, value in rope.items() if value is not None}
    theta = _number({**raw, **rope}, "rope_theta", 10_000.0, path)
    unknown = sorted(
        rope.keys() - _ROPE_KEYS[kind] - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    )
    if unknown:
        raise ConfigError(f"{path} has {unknown[0]}={rope[unknown[0]]} in rotary positions of type {kind!r}")
    if kind == "default":
        return {"rope_theta": theta}
    values: dict[str, Any] = {
        key: _number(rope, key, 1.0, path) for key in rope.keys() & _ROPE_KEYS[kind] - {"truncate"}
    }
    if kind in (
        "llama3",
        "yarn",
    ):  # as in transformers, a key of the model comes before that of its rotary positions
        places = (raw, rope, {_ORIGINAL: length})
        values[_ORIGINAL] = next(
            _size(place, _ORIGINAL, path) for place in places if place.get(_ORIGINAL) is not None
        )
    if "truncate" in rope:
        values["truncate"] = rope["truncate"] is True
    scales = values.pop("mscale", None), values.pop("mscale_all_dim", None)
    if all(scales) and "attention_factor" not in values:
        above, below = (yarn_factor(values["factor"], scale) for scale in scales)
        values["attention_factor"] = above / below
    try:
        return {"rope_theta": theta, "rope_scaling": RopeScalingConfig(rope_type=RopeType(kind), **values)}
    except ConfigError as error:
        raise ConfigError(f"{path} has rotary positions that cannot be computed: {error}") from error


def _number(raw: dict[str, Any], key: str, default: float, path: Path) -> float:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise ConfigError(f"{path} has {key}={value}, where a positive number is needed")
    return float(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_capped(path, _MAX_JSON_BYTES))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; give the folder of a Hugging Face model") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return value


def _files(folder: Path) -> list[Path]:
    """The files of weights of a model."""
    index = folder / INDEX_NAME
    if not index.exists():
        if not (folder / WEIGHTS_NAME).is_file():
            raise ConfigError(f"{folder} has no {WEIGHTS_NAME}; weights in other formats cannot be imported")
        return [folder / WEIGHTS_NAME]
    listed = _read_json(index).get("weight_map")
    if not isinstance(listed, dict):
        raise ConfigError(f"{index} has no weight_map")
    for name in listed.values():
        if not isinstance(name, str) or not is_file_name(name):
            raise ConfigError(f"{index} names the file {name!r}, which is not in its folder")
    return [folder / name for name in sorted(set(listed.values()))]


def _weights(folder: Path, model: ModelConfig) -> dict[str, Weight]:
    """The weights under our names, in their order, after checking that they are exactly those of the decoder."""
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in Decoder(model, seed=0).named_parameters()}
    ours_of = {theirs: ours for ours, theirs in hugging_face_names(model).items()}
    weights: dict[str, Weight] = {}
    head = None
    for path in _files(folder):
        try:
            for name, weight in open_safetensors(path).items():
                if name.endswith(_BUFFER):
                    continue
                if name == "lm_head.weight" and model.tie_embeddings:
                    head = weight
                    continue
                ours = ours_of.get(name)
                if ours is None or weight.shape != tuple(shapes[ours]) or weight.dtype not in DTYPES.values():
                    raise ConfigError(f"{path} has the tensor {name!r}, which does not fit its config.json")
                weights[ours] = weight
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
    missing = sorted(theirs for theirs, ours in ours_of.items() if ours not in weights)
    if missing:
        raise ConfigError(f"{folder} lacks the tensor {missing[0]!r}, and {len(missing) - 1} others")
    if head is not None and not equal(head, weights["embed.weight"]):
        raise ConfigError(f"{folder} has tie_word_embeddings=true, but its lm_head.weight is another matrix")
    return {name: weights[name] for name in shapes}


def _untrained(
    model: ModelConfig, sequence_length: int, tokenizer: Tokenizer, template: str | None
) -> TrainedModel:
    """The model at step 0 of a run with default options, without its weights."""
    given = [
        "run_dir=imported",
        "total_steps=1",
        "data.manifest=none",
        f"data.sequence_length={sequence_length}",
    ]
    config = load_config(TrainConfig, given, "config")
    config.model = model
    return TrainedModel(
        config=config,
        weights={},
        tokenizer=tokenizer,
        step=0,
        tokens_seen=0,
        sequence_length=sequence_length,
        precision=Precision.fp32,
        chat_template=template,
    )
