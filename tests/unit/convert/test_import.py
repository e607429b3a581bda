"""A Hugging Face model becomes a run folder with the same weights, or a sentence says what cannot be read."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.config import ModelConfig, RopeScalingConfig, RopeType
from pretrain.convert import hugging_face as export_module
from pretrain.convert.hugging_face import export, hugging_face_names
from pretrain.convert.hugging_face_import import model_of
from pretrain.errors import ConfigError, RunError
from pretrain.model.decoder import build_decoder
from pretrain.trained import load_trained
from support.trained_run import SMALL, make_run, script

transformers = pytest.importorskip("transformers")

YARN = RopeScalingConfig(
    rope_type=RopeType.yarn,
    factor=4.0,
    original_max_position_embeddings=16,
    beta_fast=4.0,
    beta_slow=0.5,
    attention_factor=1.25,
    truncate=False,
)
MODELS = {
    "llama": SMALL,
    "tied": replace(SMALL, tie_embeddings=True, rope_theta=500.0, norm_eps=1e-3),
    "qwen2": replace(SMALL, attention_bias=True),
    "linear": replace(SMALL, rope_scaling=RopeScalingConfig(rope_type=RopeType.linear, factor=3.0)),
    "llama3": replace(
        SMALL,
        rope_scaling=RopeScalingConfig(
            rope_type=RopeType.llama3,
            factor=4.0,
            original_max_position_embeddings=16,
            low_freq_factor=0.5,
            high_freq_factor=8.0,
        ),
    ),
    "yarn": replace(SMALL, rope_scaling=YARN),
    "qwen3": replace(SMALL, qk_norm=True, n_kv_heads=1, d_head=12),
}


def exported(folder: Path, model: ModelConfig = SMALL, **options: Any) -> Path:
    make_run(folder / "run", replace(model))
    export(load_trained(folder / "run"), folder / "hf", **({"dtype": torch.bfloat16} | options))
    return folder / "hf"


def import_from(folder: Path, output: Path, **options: Any) -> None:
    launch = script("import_model")
    launch.main(launch.ImportConfig(input=str(folder), output=str(output), **options))


@pytest.mark.parametrize("max_shard_bytes", [20_000, 5_000_000])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_import_and_export_give_the_same_bits(
    tmp_path: Path, model: ModelConfig, max_shard_bytes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported(tmp_path, model, max_shard_bytes=max_shard_bytes)
    import_from(folder, tmp_path / "imported")
    assert f"model.d_ff={model.d_ff}" in capsys.readouterr().out
    imported = load_trained(tmp_path / "imported")
    assert (imported.step, imported.tokens_seen, imported.sequence_length) == (0, 0, 64)
    assert imported.config.model.rope_scaling == model.rope_scaling
    assert imported.tokenizer.sha256 == load_trained(tmp_path / "run").tokenizer.sha256
    export(imported, tmp_path / "again", dtype=torch.bfloat16, max_shard_bytes=max_shard_bytes)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == sorted(path.name for path in (tmp_path / "again").glob("*.safetensors"))
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_models_that_transformers_has_saved_are_read(tmp_path: Path, family: str) -> None:
    folder = exported(tmp_path)
    shape = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 96, "vocab_size": 448}
    if family == "Mistral":
        shape["sliding_window"] = None
    torch.manual_seed(1)
    theirs = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**shape))
    with torch.no_grad():  # transformers begins with biases of 0
        for name, weight in theirs.named_parameters():
            if name.endswith("bias"):
                weight.normal_()
    theirs.save_pretrained(folder)
    import_from(folder, tmp_path / "imported")
    imported = load_trained(tmp_path / "imported")
    assert imported.sequence_length == 96
    layer = theirs.model.layers[1]
    assert torch.equal(imported.weights["blocks.1.feed_forward.up.weight"], layer.mlp.up_proj.weight)
    if family == "Qwen2":
        assert torch.equal(imported.weights["blocks.1.attention.k.bias"], layer.self_attn.k_proj.bias)


SCALINGS: list[dict[str, Any]] = [
    {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 5e5},
    {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    {
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        "rope_theta": 1e6,
    },
    {"rope_scaling": {"type": "yarn", "factor": 4}, "original_max_position_embeddings": 256},
    {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
            "truncate": False,
        }
    },
]


@pytest.mark.parametrize("raw", SCALINGS)
@pytest.mark.parametrize("biased", [False, True])
def test_scaled_positions_are_those_of_transformers(raw: dict[str, Any], biased: bool) -> None:
    """At positions up to 16 times beyond the original length, where a scaling shows."""
    kind = "Qwen2" if biased else "Llama"
    raw = copy.deepcopy(raw) | {"max_position_embeddings": 2048, "num_key_value_heads": 2}
    shape = {
        key: value for key, value in GOOD.items() if key not in ("architectures", "max_position_embeddings")
    }
    theirs = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**shape, **copy.deepcopy(raw))
    ).eval()
    torch.manual_seed(0)
    state = theirs.state_dict()
    for weight in state.values():
        weight.normal_(std=0.2)
    model, length = model_of(GOOD | raw | {"architectures": [f"{kind}ForCausalLM"]}, Path("config.json"))
    assert length == 2048
    weights = {ours: state[name] for ours, name in hugging_face_names(model).items()}
    positions = torch.arange(40)[None] * 200
    tokens = torch.randint(0, 448, (1, 40))
    with torch.no_grad():
        found = build_decoder(model, weights, "cpu", torch.float32).logits(tokens, positions)
        expected = theirs(tokens, position_ids=positions, attention_mask=torch.ones_like(tokens)).logits
        unscaled = replace(model, rope_scaling=RopeScalingConfig())
        other = build_decoder(unscaled, weights, "cpu", torch.float32).logits(tokens, positions)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (other - expected).abs().max() > 0.01


GOOD: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48}
GOOD |= {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 448, "max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
        ({"architectures": None}, "architectures=None"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope'"),
        ({"rope_scaling": "su"}, "'su'"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, r"\['yarn'\]"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor=2"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, r"factor=0\.5"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 1.0}}, r"alpha=1\.0"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 9}},
            "low_freq_factor=9",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 0}},
            "embeddings=0",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2}, "rope_theta": 1.0}, r"rope_theta=1\.0"),
        ({"sliding_window": 32}, "sliding_window=32"),
        ({"hidden_size": "32"}, "hidden_size=32"),
        ({"num_hidden_layers": None}, "num_hidden_layers=None"),
        ({"vocab_size": 1 << 40}, "vocab_size=1099511627776"),
        ({"rms_norm_eps": -1}, "rms_norm_eps=-1"),
        ({"rope_theta": True}, "rope_theta=True"),
        ({"num_attention_heads": 5}, "n_heads=5"),
    ],
)
def test_what_the_decoder_lacks_is_named(changes: dict[str, Any], named: str) -> None:
    model_of(GOOD, Path("config.json"))
    model_of(GOOD | {"sliding_window": 4096, "rope_scaling": None}, Path("config.json"))
    with pytest.raises(ConfigError, match=named):
        model_of(GOOD | changes, Path("config.json"))


def test_other_weights_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    folder = exported(tmp_path)
    file = folder / "model.safetensors"
    weights = load_file(file)

    def refused(error: type[Exception], named: str) -> None:
        with pytest.raises(error, match=named):
            import_from(folder, tmp_path / "imported")
        assert not [path for path in tmp_path.iterdir() if "imported" in path.name]

    save_file({name: w for name, w in weights.items() if "1.mlp.up_proj" not in name}, file)
    refused(ConfigError, r"'model\.layers\.1\.mlp\.up_proj\.weight'")
    save_file(weights | {"model.norm.weight": torch.ones(31)}, file)
    refused(ConfigError, r"'model\.norm\.weight'")
    save_file(weights | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, file)
    refused(ConfigError, r"q_proj\.bias'")
    save_file(weights, file)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    refused(ConfigError, r"lm_head\.weight")
    (folder / "config.json").write_text(json.dumps({**raw, "model_type": None}))
    refused(ConfigError, "no model_type")
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    refused(ConfigError, r"'\.\./x\.safetensors'")
    (folder / "model.safetensors.index.json").unlink()
    file.write_bytes(b"\xff" * 100)
    refused(ConfigError, r"model\.safetensors cannot be read")
    file.unlink()
    refused(ConfigError, "model.safetensors")


@pytest.mark.parametrize("max_shard_bytes", [20_000, 5_000_000])
def test_a_large_model_is_compared_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_shard_bytes: int
) -> None:
    """With what else may lie there: a tied head, buffers of old versions, and files that are not the model's."""
    folder = exported(tmp_path, MODELS["tied"], max_shard_bytes=max_shard_bytes)
    index = folder / "model.safetensors.index.json"
    file_of = json.loads(index.read_text())["weight_map"] if index.exists() else {}
    file = folder / file_of.get("model.embed_tokens.weight", "model.safetensors")
    weights = load_file(file)
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(weights | head | buffer, file, {"format": "pt"})
    save_file({"model.norm.weight": torch.zeros(32)}, folder / "original.safetensors")
    monkeypatch.setattr("pretrain.convert.hugging_face.WHOLE_MODEL_BYTES", 0)
    read: list[str] = []
    real = export_module.stream_weights
    monkeypatch.setattr(
        export_module, "stream_weights", lambda m, w: read.append(type(m).__name__) or real(m, w)
    )
    import_from(folder, tmp_path / "imported")
    assert read == ["LlamaForCausalLM"]  # and not from_pretrained
    monkeypatch.setattr("pretrain.convert.hugging_face_import._number", lambda raw, key, default, path: 0.5)
    with pytest.raises(RunError, match="logits"):
        import_from(folder, tmp_path / "other")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ConfigError, match=r"accelerate.*pretrain\[export\]"):
        import_from(folder, tmp_path / "other")


def test_a_model_with_other_logits_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key of config.json that this program does not know may change the model: the logits tell."""
    folder = exported(tmp_path)
    monkeypatch.setattr("pretrain.convert.hugging_face_import._number", lambda raw, key, default, path: 0.5)
    with pytest.raises(RunError, match="logits"):
        import_from(folder, tmp_path / "imported")
    assert not (tmp_path / "imported").exists()
