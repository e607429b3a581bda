"""An exported classifier in `transformers`, without code of ours: the same logits from texts, alone and in a batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.config import ModelConfig, Pooling
from pretrain.convert.export import export_form
from pretrain.convert.form import Form, Format, Stored
from pretrain.convert.hugging_face import export, padding_id
from pretrain.corpus.labels import beginning
from pretrain.errors import ConfigError, RunError
from pretrain.trained import TrainedModel, check_writes_text, load_trained
from support.trained_run import SMALL, TEXTS, make_run

transformers = pytest.importorskip("transformers")
CLASSES = ["bad", "good", "so-so"]
MODELS = {
    "LlamaForSequenceClassification": SMALL,
    "Qwen3ForSequenceClassification": replace(SMALL, qk_norm=True, tie_embeddings=True),
    "SeedOssForSequenceClassification": replace(SMALL, attention_bias=True),
}


def trained_classifier(folder: Path, model: ModelConfig) -> TrainedModel:
    make_run(folder / "run", replace(model, classes=CLASSES), objective="classify")
    return load_trained(folder / "run")


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_the_same_logits_from_texts(tmp_path: Path, name: str) -> None:
    trained = trained_classifier(tmp_path, MODELS[name])
    parity = export(trained, tmp_path / "out", dtype=torch.float32)
    assert parity.holds
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert type(model).__name__ == name
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert model.config.label2id == {label: number for number, label in enumerate(CLASSES)}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = trained.decoder(torch.device("cpu"), torch.float32)
    batch = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    found = model(**batch).logits.detach()
    for row, text in enumerate(TEXTS):
        whole = np.array(trained.tokenizer.encode_document(text))
        tokens = beginning(whole, trained.sequence_length, trained.tokenizer.eos_id)
        expected = ours.class_logits(torch.from_numpy(tokens)[None], torch.tensor([len(tokens)]))[0]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)
    assert float(found.std(0).min()) > 0.01  # texts differ, so that a wrong token would show


def test_another_head_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison before publication reads the classes' logits."""
    trained = trained_classifier(tmp_path, SMALL)
    from pretrain.convert import hugging_face

    written = hugging_face.write_model

    def with_another_head(model: TrainedModel, *arguments: object) -> None:
        weights = {**model.weights, "head.weight": model.weights["head.weight"].flip(0)}
        written(replace(model, weights=weights), *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(hugging_face, "write_model", with_another_head)
    with pytest.raises(RunError, match="differs from the trained one"):
        export(trained, tmp_path / "out", dtype=torch.float32)
    assert not (tmp_path / "out").exists()


def test_what_no_other_program_computes_is_refused_by_name(tmp_path: Path) -> None:
    trained = trained_classifier(tmp_path, replace(SMALL, pooling=Pooling.mean))
    with pytest.raises(ConfigError, match=r"model\.pooling=mean.*cannot be exported"):
        export(trained, tmp_path / "out", dtype=torch.float32)
    for form in (Form(Format.gguf, Stored.fp16), Form(Format.hugging_face, Stored.int8)):
        with pytest.raises(ConfigError, match="objective=classify"):
            export_form(trained, tmp_path / "run", tmp_path / "out", form)
    with pytest.raises(ConfigError, match=r"objective=classify.*launch/eval\.py"):
        check_writes_text(trained, tmp_path / "run")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_padding_pads_with_bos(tmp_path: Path) -> None:
    trained = trained_classifier(tmp_path, SMALL)
    tokenizer = trained.tokenizer
    assert padding_id(trained.config, tokenizer) == tokenizer.pad_id
    tokenizer.pad_id = tokenizer.eos_id
    assert padding_id(trained.config, tokenizer) == tokenizer.bos_id
    tokenizer.bos_id = tokenizer.eos_id
    with pytest.raises(ConfigError, match="one token for bos, eos and padding"):
        padding_id(trained.config, tokenizer)
