"""A Hugging Face model becomes a run folder with the same weights, or a sentence says what cannot be read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.config import ModelConfig
from pretrain.convert.hugging_face import export
from pretrain.convert.hugging_face_import import model_of
from pretrain.errors import ConfigError, RunError
from pretrain.trained import load_trained
from support.trained_run import SMALL, make_run, script

transformers = pytest.importorskip("transformers")

MODELS = {
    "llama": SMALL,
    "tied": replace(SMALL, tie_embeddings=True, rope_theta=500.0, norm_eps=1e-3),
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
    export(imported, tmp_path / "again", dtype=torch.bfloat16, max_shard_bytes=max_shard_bytes)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == sorted(path.name for path in (tmp_path / "again").glob("*.safetensors"))
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen3"])
def test_models_that_transformers_has_saved_are_read(tmp_path: Path, family: str) -> None:
    folder = exported(tmp_path)
    shape = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 96, "vocab_size": 448}
    if family == "Mistral":
        shape["sliding_window"] = None
    torch.manual_seed(1)
    theirs = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**shape))
    theirs.save_pretrained(folder)
    import_from(folder, tmp_path / "imported")
    imported = load_trained(tmp_path / "imported")
    assert imported.sequence_length == 96
    assert torch.equal(
        imported.weights["blocks.1.feed_forward.up.weight"], theirs.model.layers[1].mlp.up_proj.weight
    )


GOOD: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48}
GOOD |= {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 448, "max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM"),
        ({"architectures": None}, "architectures=None"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "'llama3'"),
        ({"rope_scaling": "yarn"}, "'yarn'"),
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
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    refused(ConfigError, r"'\.\./x\.safetensors'")
    (folder / "model.safetensors.index.json").unlink()
    file.write_bytes(b"\xff" * 100)
    refused(ConfigError, r"model\.safetensors cannot be read")
    file.unlink()
    refused(ConfigError, "model.safetensors")


def test_a_model_with_other_logits_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key of config.json that this program does not know may change the model: the logits tell."""
    folder = exported(tmp_path)
    monkeypatch.setattr("pretrain.convert.hugging_face_import._number", lambda raw, key, default, path: 0.5)
    with pytest.raises(RunError, match="logits"):
        import_from(folder, tmp_path / "imported")
    assert not (tmp_path / "imported").exists()
