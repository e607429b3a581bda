"""Filling masks with a model trained with objective=mlm, and scoring it on masked tokens."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.batch import IGNORED_LABEL
from pretrain.config import MlmConfig
from pretrain.corpus.shards import Corpus
from pretrain.data.masking import Masking
from pretrain.distributed import World
from pretrain.errors import ConfigError
from pretrain.evaluate.heldout import TokenDocument, evaluate_loss, score_documents
from pretrain.generation.fill_mask import fill_masks
from pretrain.model.decoder import Decoder
from pretrain.trained import load_trained
from support.texts import CHUNK, Text
from support.trained_run import SMALL, make_run, script

CPU = torch.device("cpu")
ALONE = World(rank=0, size=1, local_rank=0, device=CPU)
MASKING = Masking(MlmConfig(fraction=0.3), 7, 3, np.arange(4, 300))


def model_that_fills() -> Decoder:
    model = Decoder(replace(SMALL, vocab_size=320), seed=1, causal=False).eval()
    with torch.no_grad():
        for weight in (model.embed.weight, model.head.weight):
            weight.mul_(30)
    return model


def nll(model: Decoder, tokens: np.ndarray, labels: np.ndarray) -> list[float]:
    """Of each label at its own position, from the logits of one document alone."""
    with torch.no_grad():
        log_p = model.logits(torch.from_numpy(tokens[None].astype(np.int64)))[0].double().log_softmax(-1)
    return [-float(log_p[at, labels[at]]) for at in np.flatnonzero(labels != IGNORED_LABEL)]


# --- scores ---


def test_held_out_masks_are_the_same_at_each_call_for_each_run(tmp_path: Path) -> None:
    """And the loss is that of each piece of a document, alone, in any micro batch."""
    text, model = Text(tmp_path / "held", 9 * CHUNK + 20, seed=1), model_that_fills()
    corpus, seen = Corpus(text.manifest), []
    results = []
    for masking, micro in ((MASKING, 3), (MASKING, 4), (replace(MASKING, seed=8), 2)):
        rows: list[list[int]] = []

        def forward(batch, rows=rows):
            rows += torch.cat([batch.tokens, batch.labels], 1).tolist()
            return model(*batch[:4])

        found = evaluate_loss(
            forward,
            corpus,
            sequence_length=16,
            micro_batch_sequences=micro,
            max_sequences=None,
            world=ALONE,
            document_masking=True,
            masking=masking,
        )
        seen.append(rows)
        results.append(found.overall)
    assert seen[0] == seen[1] == seen[2]
    expected: list[float] = []
    for row, (c, s) in zip(seen[0], text.sequences(16), strict=True):
        tokens, labels = np.array(row[:16]), np.array(row[16:])
        ids = np.array(text.reference(c, s, 16, masking=True)[3])
        for piece in np.unique(ids):
            expected += nll(model, tokens[ids == piece], labels[ids == piece])
    for result in results:
        assert result.loss == pytest.approx(np.mean(expected), rel=1e-5)
        assert result.tokens == len(expected)
        assert result.perplexity == pytest.approx(np.exp(result.loss))
        assert "bits_per_byte" not in result.as_dict()


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_documents_are_scored_on_their_masked_tokens(micro_batch: int) -> None:
    """Short ones whole, whatever the others of a batch are: padding is not seen."""
    draw, model = np.random.default_rng(0), model_that_fills()
    documents = [
        TokenDocument("x", np.concatenate([[1], draw.integers(4, 300, n), [2]]), 3 * n)
        for n in (40, 7, 21, 33)
    ]
    result = score_documents(
        model,
        documents,
        sequence_length=64,
        micro_batch_sequences=micro_batch,
        device=CPU,
        masking=MASKING,
    )
    masked = [MASKING.for_heldout().hidden_document(d.tokens, d.labels) for d in documents]
    expected = [value for tokens, labels in masked for value in nll(model, tokens, labels)]
    assert result.overall.tokens == len(expected) > 20
    assert result.overall.loss == pytest.approx(np.mean(expected), rel=1e-5)
    assert result.overall.bits_per_byte is None


def test_a_text_without_a_masked_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="masked language modeling chose no token"):
        score_documents(
            model_that_fills(),
            [TokenDocument("x", np.array([1, 2]), 0)],
            sequence_length=8,
            micro_batch_sequences=1,
            device=CPU,
            masking=MASKING,
        )


# --- filling ---


def test_masks_are_filled_with_the_most_probable_tokens(tmp_path: Path) -> None:
    model = make_run(tmp_path / "run", objective="mlm")
    tokenizer = load_trained(tmp_path / "run").tokenizer
    text = "It is <mask> truth <mask>"
    ids = [1, *tokenizer.encode("It is"), 4, *tokenizer.encode(" truth"), 4, 2]
    with torch.no_grad():
        p = model.logits(torch.tensor([ids]))[0].softmax(-1)
    filled = fill_masks(model, tokenizer, text, 3)
    for place, mask in zip([at for at, token in enumerate(ids) if token == 4], filled, strict=True):
        of_text = p[place, 5:400]  # neither special tokens nor rows that only pad the embedding
        assert [c.probability for c in mask] == pytest.approx(of_text.topk(3).values.tolist())
        assert [c.token for c in mask] == (of_text.topk(3).indices + 5).tolist()
        assert [c.text for c in mask] == [tokenizer.decode_after(ids[1:place], [c.token]) for c in mask]
    assert len(fill_masks(model, tokenizer, "<mask>", 10**6)[0]) == 395


def test_the_script_fills_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run", objective="mlm")
    generate = script("generate")
    config = generate.GenerateConfig(
        run_dir=str(tmp_path / "run"), prompt=["a <mask> b", "<mask><mask>"], top_k=2, json=True
    )
    generate.main(config)
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert [len(sample["masks"]) for sample in found["samples"]] == [1, 2]
    assert all(len(mask) == 2 for sample in found["samples"] for mask in sample["masks"])
    best = found["samples"][0]["masks"][0][0]
    assert lines[:3] == ["a <mask> b", "mask:", f"  {best['probability']:7.2%}  {best['text']!r}"]


def test_models_do_only_what_they_were_trained_for(tmp_path: Path) -> None:
    make_run(tmp_path / "fills", objective="mlm")
    make_run(tmp_path / "continues")
    generate = script("generate")
    for run, prompt, words in (
        ("fills", ["a b"], ["prompt='a b'", "objective=mlm", "write <mask>"]),
        ("fills", [], ["objective=mlm", "write <mask>"]),
        ("continues", ["a <mask>"], ["prompt='a <mask>'", "objective=causal", "fills no masks"]),
    ):
        with pytest.raises(ConfigError) as raised:
            generate.main(generate.GenerateConfig(run_dir=str(tmp_path / run), prompt=prompt))
        assert all(word in str(raised.value) for word in words), raised.value


def test_options_of_continuations_are_refused_where_masks_are_filled(tmp_path: Path) -> None:
    """Each that has no effect, and none that has its usual value."""
    make_run(tmp_path / "run", objective="mlm")
    generate = script("generate")
    given = {"run_dir": str(tmp_path / "run"), "prompt": ["a <mask>"]}
    changes = {"n_samples": 2, "max_new_tokens": 3, "temperature": 0.0, "top_p": 0.5, "min_p": 0.1}
    changes |= {"repetition_penalty": 1.1, "stop": ["."], "seed": 1, "batch_sequences": 2}
    assert set(changes) == set(generate.OF_CONTINUATIONS)
    heeded = {"run_dir", "prompt", "prompt_file", "step", "which", "weights", "checkpoint_target", "top_k"}
    heeded |= {"precision", "json", "chat", "system"}  # the last two are refused by name elsewhere
    assert {field.name for field in fields(generate.GenerateConfig)} == heeded | set(changes)
    for name, value in changes.items():
        with pytest.raises(
            ConfigError, match=rf"^{name}={re.escape(str(value))} has no effect.*objective=mlm"
        ):
            generate.main(generate.GenerateConfig(**given, **{name: value}))
    generate.main(generate.GenerateConfig(**given, temperature=0.8, top_k=2))


def test_the_script_scores_masked_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run", objective="mlm")
    (tmp_path / "held.txt").write_text("It is a truth universally acknowledged. " * 20)
    evaluate = script("eval")
    found = []
    for micro_batch in (1, 8):
        options = {"micro_batch_sequences": micro_batch, "json": True, "precision": evaluate.Precision.fp32}
        evaluate.main(
            evaluate.EvalConfig(run_dir=str(tmp_path / "run"), input=[str(tmp_path / "held.txt")], **options)
        )
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert found[0]["tokens"] == found[1]["tokens"] > 5
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)
    assert "bits_per_byte" not in found[0]
