"""An import copies a model piece by piece and compares it weight by weight, whatever its size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.tensors import load_weights
from pretrain.config import ModelConfig
from pretrain.convert.hugging_face import hugging_face_names, parameter_shapes
from pretrain.convert.hugging_face_import import _untrained, _weights, import_model, model_of
from pretrain.convert.streamed import Weight, write_safetensors
from pretrain.convert.weights_only import save_weights
from support.peak import peak_bytes
from support.trained_run import train_tokenizer

MIB = 1 << 20


def written_model(folder: Path, **shape: int) -> tuple[ModelConfig, int]:
    """Write a model whose weights count upwards, in bf16."""
    raw = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    raw |= {"num_attention_heads": 8, "max_position_embeddings": 64}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw | shape))
    model, length = model_of(raw | shape, folder / "config.json")
    names = hugging_face_names(model)
    made = {
        names[name]: Weight(
            tuple(shape), torch.bfloat16, lambda start, stop: torch.arange(start, stop).bfloat16()
        )
        for name, shape in parameter_shapes(model).items()
    }
    write_safetensors(folder / "model.safetensors", made)
    return model, length


@pytest.mark.parametrize(
    ("n_layers", "d_model", "vocab_size", "least_mib"),
    [
        pytest.param(1, 1024, 10_000, 115, id="118 MiB"),
        pytest.param(12, 2560, 64_000, 4000, marks=pytest.mark.long, id="4 GiB"),
    ],
)
def test_a_copy_grows_by_less_than_64_mib(
    tmp_path: Path, n_layers: int, d_model: int, vocab_size: int, least_mib: int
) -> None:
    model, length = written_model(
        tmp_path / "hf",
        num_hidden_layers=n_layers,
        hidden_size=d_model,
        intermediate_size=2 * d_model,
        vocab_size=vocab_size,
    )
    (tmp_path / "run").mkdir()
    tokenizer = train_tokenizer(tmp_path / "tokenizer.model")
    before = peak_bytes(reset=True)
    weights = _weights(tmp_path / "hf", model)
    save_weights(tmp_path / "run", _untrained(model, length, tokenizer, None), weights)
    grown = peak_bytes() - before
    written = sum(path.stat().st_size for path in (tmp_path / "run/checkpoints").rglob("*.safetensors"))
    assert written > least_mib * MIB
    assert grown < 64 * MIB, f"{grown / MIB:.0f} MiB"
    if least_mib < 1000:
        _, read, _ = load_weights(tmp_path / "run")
        assert read.keys() == parameter_shapes(model).keys()
        expected = torch.arange(d_model * vocab_size).bfloat16().float().view(vocab_size, d_model)
        assert torch.equal(read["head.weight"], expected)


def test_the_comparison_holds_neither_side_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """112 MiB in fp32, of which the largest weight has 4 MiB."""
    monkeypatch.setattr("pretrain.convert.hugging_face.WHOLE_MODEL_BYTES", 0)
    tokenizer = train_tokenizer(tmp_path / "tokenizer.model")
    shape = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 448}
    written_model(tmp_path / "small", **shape, num_hidden_layers=1)
    written_model(tmp_path / "large", **shape, num_hidden_layers=7)
    import_model(
        tmp_path / "small", tokenizer, tmp_path / "first"
    )  # what is imported at first use does not count
    before = peak_bytes(reset=True)
    _, parity = import_model(tmp_path / "large", tokenizer, tmp_path / "run")
    grown = peak_bytes() - before
    assert parity.holds
    written = sum(path.stat().st_size for path in (tmp_path / "run/checkpoints").rglob("*.safetensors"))
    assert written > 110 * MIB
    assert grown < 80 * MIB, f"{grown / MIB:.0f} MiB"
