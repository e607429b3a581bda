"""An import reads and writes a model piece by piece, so that its size does not matter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.tensors import load_weights
from pretrain.convert.hugging_face import hugging_face_names
from pretrain.convert.hugging_face_import import _untrained, _weights, model_of
from pretrain.convert.streamed import Weight, write_safetensors
from pretrain.convert.weights_only import save_weights
from pretrain.model.decoder import Decoder
from support.trained_run import train_tokenizer

MIB = 1 << 20


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.parametrize(
    ("n_layers", "d_model", "vocab_size", "least_mib"),
    [
        pytest.param(1, 1024, 20_000, 190, id="200 MiB"),
        pytest.param(12, 2560, 64_000, 4000, marks=pytest.mark.long, id="4 GiB"),
    ],
)
def test_memory_grows_by_less_than_64_mib(
    tmp_path: Path, n_layers: int, d_model: int, vocab_size: int, least_mib: int
) -> None:
    """The comparison with transformers that follows holds the whole model and is not measured here."""
    raw = {"architectures": ["LlamaForCausalLM"], "hidden_size": d_model, "intermediate_size": 2 * d_model}
    raw |= {"num_hidden_layers": n_layers, "num_attention_heads": 8, "vocab_size": vocab_size}
    raw |= {"max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    model, length = model_of(raw, tmp_path / "config.json")
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in Decoder(model, seed=0).named_parameters()}
    names = hugging_face_names(model)
    made = {
        names[name]: Weight(shape, torch.bfloat16, lambda start, stop: torch.arange(start, stop).bfloat16())
        for name, shape in shapes.items()
    }
    write_safetensors(tmp_path / "model.safetensors", made)
    (tmp_path / "run").mkdir()
    tokenizer = train_tokenizer(tmp_path / "tokenizer.model")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = peak_bytes()
    weights = _weights(tmp_path, model)
    save_weights(tmp_path / "run", _untrained(model, length, tokenizer, None), weights)
    grown = peak_bytes() - before
    written = sum(path.stat().st_size for path in (tmp_path / "run/checkpoints").rglob("*.safetensors"))
    assert written > least_mib * MIB
    assert grown < 64 * MIB, f"{grown / MIB:.0f} MiB"
    if least_mib < 1000:
        _, read, _ = load_weights(tmp_path / "run")
        assert read.keys() == shapes.keys()
        expected = torch.arange(d_model * vocab_size).bfloat16().float().view(vocab_size, d_model)
        assert torch.equal(read["head.weight"], expected)
