"""Adapters in peft's format, without a run: of models whose matrices have biases, and of tied ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.state import BaseReference
from pretrain.config import LoraConfig, ModelConfig
from pretrain.convert import adapters as export_module
from pretrain.model.decoder import Decoder
from pretrain.model.lora import add_adapters, is_adapter, merged, plain_name
from pretrain.trained import Adapters, load_trained
from support.trained_run import SMALL, make_run

pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.mark.parametrize(
    "model",
    [replace(SMALL, attention_bias=True), replace(SMALL, tie_embeddings=True)],
    ids=["biases", "tied"],
)
def test_peft_computes_what_the_merged_model_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: ModelConfig
) -> None:
    make_run(tmp_path / "run", model)
    base, lora = load_trained(tmp_path / "run"), LoraConfig(r=4)
    decoder = Decoder(model, seed=1)
    add_adapters(decoder, lora, seed=2)
    torch.manual_seed(3)
    weights = {
        plain_name(name): torch.randn(p.shape) * 0.1
        for name, p in decoder.named_parameters()
        if is_adapter(name)
    }
    adapters = Adapters(lora, weights, BaseReference(step=3, complete_xxh3_128="0" * 32))
    monkeypatch.setattr(export_module, "load_base_weights", lambda *args: dict(base.weights))
    trained = replace(base, weights=merged(model, lora, base.weights, weights), adapters=adapters)
    found = export_module.export_adapters(trained, str(tmp_path / "run"), tmp_path / "out")
    assert found.adapters == 14
    assert found.parity.max_difference < 1e-5 * max(1.0, found.parity.tolerance * 1e4)
    alone = replace(trained, weights=base.weights)
    with pytest.raises(export_module.RunError, match="peft computes something else"):
        export_module.export_adapters(alone, str(tmp_path / "run"), tmp_path / "other")
