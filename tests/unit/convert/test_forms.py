"""Every form of an export is what the checkpoint holds, as other programs read it, and says what it costs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from pretrain.config import ModelConfig, RopeScalingConfig, RopeType
from pretrain.convert.export import Exported, export_form
from pretrain.convert.form import Form, Format, Stored, form_of
from pretrain.convert.heldout_loss import heldout_loss
from pretrain.convert.int8 import exported_weights
from pretrain.corpus.chat import OWN_TEMPLATE
from pretrain.corpus.shards import Corpus
from pretrain.errors import ConfigError, RunError
from pretrain.model.streamed import streamed_decoder
from pretrain.trained import TrainedModel, load_trained, open_trained
from support.peak import peak_bytes
from support.trained_run import SMALL, TEXTS, make_run, script, write_heldout

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")
pytest.importorskip("torchao")

BLOCKS = replace(SMALL, d_ff=64)  # rows of whole blocks of 32, which Q8_0 needs
MODELS = {
    "llama": BLOCKS,
    "llama_tied_wide": replace(BLOCKS, tie_embeddings=True, n_kv_heads=1, d_head=24, rope_theta=500.0),
    "qwen3": replace(BLOCKS, qk_norm=True),
    "qwen2_tied": replace(BLOCKS, attention_bias=True, tie_embeddings=True),
}
ORIGINAL: dict[str, Any] = {"factor": 8.0, "original_max_position_embeddings": 32}
INT8 = Form(Format.hugging_face, Stored.int8)
F16, Q8_0 = Form(Format.gguf, Stored.fp16), Form(Format.gguf, Stored.int8)
OF_NAME = {"int8": INT8, "f16": F16, "q8_0": Q8_0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for name, model in MODELS.items():
        make_run(folder / name, replace(model))
    return {name: folder / name for name in MODELS}


@pytest.fixture
def trained(runs: dict[str, Path]) -> Iterator[TrainedModel]:
    with open_trained(runs["llama"]) as found:
        yield found


def exported(run_dir: Path, output: Path, form: Form, **options: Any) -> Exported:
    with open_trained(run_dir) as found:
        return export_form(found, run_dir, output, form, **options)


# --- weights that are read when they are used ---


@pytest.mark.parametrize("name", MODELS)
def test_a_streamed_model_computes_the_same(runs: dict[str, Path], name: str) -> None:
    tokens = torch.randint(0, 400, (2, 40), generator=torch.Generator().manual_seed(0))
    whole = load_trained(runs[name])
    expected = whole.decoder(torch.device("cpu"), torch.float32).logits(tokens)
    with open_trained(runs[name]) as found:
        streamed = streamed_decoder(found.config.model, found.weights)
        assert torch.equal(streamed.logits(tokens), expected)
        assert all(parameter.is_meta for parameter in streamed.parameters())  # nothing stays in memory
        for weight_name, weight in whole.weights.items():
            assert torch.equal(found.weights[weight_name], weight), weight_name


# --- forms ---


@pytest.mark.parametrize(
    ("format", "stored", "precision", "expected"),
    [
        ("hugging_face", "auto", "bf16", "bf16"),
        ("hugging_face", "int8", "bf16", "int8 weights (torchao)"),
        ("gguf", "auto", "bf16", "GGUF F16"),
        ("gguf", "int8", "fp32", "GGUF Q8_0"),
    ],
)
def test_the_name_of_a_form(format: str, stored: str, precision: str, expected: str) -> None:
    from pretrain.config import Precision

    assert form_of(Format(format), Stored(stored), Precision(precision)).name == expected
    with pytest.raises(ConfigError, match="dtype=bf16"):
        form_of(Format.gguf, Stored.bf16, Precision(precision))


@pytest.mark.parametrize("form", OF_NAME.values(), ids=OF_NAME)
@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_each_form_with_equal_logits(
    runs: dict[str, Path], tmp_path: Path, name: str, form: Form
) -> None:
    """`transformers` dequantizes by its own code what this program reads back by another."""
    found = exported(runs[name], tmp_path / "out", form)
    assert found.parity is not None
    assert found.parity.holds
    assert found.parity.max_difference < 1e-5
    assert found.weight_error < (0.001 if form is F16 else 0.01)
    assert found.weight_error > 1e-5  # it is rounded
    assert found.n_bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("max_shard_bytes", [8000, 10**9])
def test_int8_is_safetensors_in_one_file_or_several(
    runs: dict[str, Path], trained: TrainedModel, tmp_path: Path, max_shard_bytes: int
) -> None:
    found = exported(runs["llama"], tmp_path / "out", INT8, max_shard_bytes=max_shard_bytes)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 3) == (max_shard_bytes == 8000)
    assert found.parity is not None
    assert found.parity.holds
    types = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            types |= {key: file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    matrices = [name for name, dtype in types.items() if dtype == torch.int8 and name.endswith("qdata")]
    assert len(matrices) == 2 * 7
    assert types["lm_head.weight"] == torch.float32  # the run's precision
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"]
        == "torchao"
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded.model.layers[0].mlp.up_proj.weight).__name__ == "Int8Tensor"


def test_gguf_says_what_the_model_is(runs: dict[str, Path], trained: TrainedModel, tmp_path: Path) -> None:
    exported(runs["llama"], tmp_path / "out", Q8_0)
    reader = gguf.GGUFReader(tmp_path / "out" / "model-q8_0.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    expected = {
        "general.architecture": "llama",
        "general.file_type": 7,
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.rope.dimension_count": 8,
        "llama.vocab_size": 448,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 3,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
    }
    assert {name: fields[name] for name in expected} == expected
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(fields["tokenizer.ggml.scores"]) == 448  # the embedding's rows
    assert tokens[:4] == ["<unk>", "<s>", "</s>", "<pad>"]
    assert types[:4] == [2, 3, 3, 3]
    assert types[tokens.index("<0x41>")] == 6
    assert types[trained.tokenizer.vocab_size :] == [5] * (448 - trained.tokenizer.vocab_size)
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    assert by_name["blk.0.attn_q.weight"].tensor_type.name == "Q8_0"
    assert by_name["output_norm.weight"].tensor_type.name == "F32"
    # llama.cpp pairs dimension 2i with 2i + 1 where this program pairs i with i + K/2: rows 0, 4, 1, 5, ... of a head.
    stored = gguf.quants.dequantize(
        by_name["blk.0.attn_q.weight"].data, by_name["blk.0.attn_q.weight"].tensor_type
    )
    ours = trained.weights["blocks.0.attention.q.weight"].numpy()
    np.testing.assert_allclose(stored[:4], ours[[0, 4, 1, 5]], atol=0.01)


def test_gguf_of_qwen3_keeps_the_order_of_rows(runs: dict[str, Path], tmp_path: Path) -> None:
    exported(runs["qwen3"], tmp_path / "out", F16)
    reader = gguf.GGUFReader(tmp_path / "out" / "model-f16.gguf")
    by_name = {tensor.name: tensor.data for tensor in reader.tensors}
    with open_trained(runs["qwen3"]) as found:
        ours = found.weights["blocks.1.attention.k.weight"].half().numpy()
        assert np.array_equal(by_name["blk.1.attn_k.weight"], ours)
        assert np.array_equal(
            by_name["blk.1.attn_k_norm.weight"], found.weights["blocks.1.attention.k_norm.weight"]
        )
    assert reader.fields["general.architecture"].contents() == "qwen3"


def test_gguf_of_qwen2_has_its_biases(runs: dict[str, Path], tmp_path: Path) -> None:
    exported(runs["qwen2_tied"], tmp_path / "out", Q8_0)
    reader = gguf.GGUFReader(tmp_path / "out" / "model-q8_0.gguf")
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    assert reader.fields["general.architecture"].contents() == "qwen2"
    assert "output.weight" not in by_name  # tied
    with open_trained(runs["qwen2_tied"]) as found:
        for part in "qkv":
            stored = by_name[f"blk.1.attn_{part}.bias"]
            assert stored.tensor_type.name == "F32"
            assert np.array_equal(stored.data, found.weights[f"blocks.1.attention.{part}.bias"])


def test_gguf_has_the_chat_template(runs: dict[str, Path], tmp_path: Path) -> None:
    with open_trained(runs["llama"]) as found:
        export_form(replace(found, chat_template=OWN_TEMPLATE), runs["llama"], tmp_path / "out", F16)
        exported(runs["llama"], tmp_path / "without", F16)
    for folder, expected in (("out", OWN_TEMPLATE), ("without", None)):
        fields = gguf.GGUFReader(tmp_path / folder / "model-f16.gguf").fields
        stored = fields.get("tokenizer.chat_template")
        assert (stored and stored.contents()) == expected


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_scaling": RopeScalingConfig(rope_type=RopeType.linear, factor=2.0)}, "rope_type=linear"),
        ({"rope_scaling": RopeScalingConfig(rope_type=RopeType.yarn, **ORIGINAL)}, "rope_type=yarn"),
        ({"rope_scaling": RopeScalingConfig(rope_type=RopeType.llama3, **ORIGINAL)}, "rope_type=llama3"),
        ({"attention_bias": True, "d_head": 24}, r"model\.d_head=24 .* would read 8"),
    ],
)
def test_what_transformers_would_read_otherwise_in_gguf_is_refused(
    trained: TrainedModel, runs: dict[str, Path], tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    config = replace(trained.config, model=replace(trained.config.model, **changes))
    with pytest.raises(ConfigError, match=named):
        export_form(replace(trained, config=config), runs["llama"], tmp_path / "out", F16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_model_that_fills_masks_is_int8_but_not_gguf(tmp_path: Path, qk_norm: bool) -> None:
    """In GGUF, a qwen3 would be read as a causal model."""
    make_run(tmp_path / "run", replace(BLOCKS, qk_norm=qk_norm), objective="mlm")
    found = exported(tmp_path / "run", tmp_path / "int8", INT8)
    assert found.parity is not None
    assert found.parity.max_difference < 1e-5
    loaded = json.loads((tmp_path / "int8" / "config.json").read_text())
    assert loaded["architectures"] == ["Qwen3ForCausalLM" if qk_norm else "EuroBertForMaskedLM"]
    for form in (F16, Q8_0):
        with pytest.raises(ConfigError, match=r"format=gguf .*objective=mlm"):
            exported(tmp_path / "run", tmp_path / "gguf", form)
    assert not (tmp_path / "gguf").exists()


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "run", replace(SMALL))  # d_ff=48
    with pytest.raises(ConfigError, match=r"48.*dtype=fp16"):
        exported(tmp_path / "run", tmp_path / "out", Q8_0)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("form", OF_NAME.values(), ids=OF_NAME)
def test_a_wrong_weight_is_not_published(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Form
) -> None:
    """Two weights of one shape change places while the files are written."""
    names = ("blocks.0.feed_forward.gate.weight", "blocks.1.feed_forward.up.weight")
    with open_trained(runs["llama"]) as found:
        swapped = dict(zip(names, reversed(names), strict=True))
        writer = "write_int8" if form is INT8 else "write_gguf"
        import pretrain.convert.export as module

        write = getattr(module, writer)

        def write_swapped(trained: TrainedModel, *rest: Any, **options: Any) -> None:
            weights = {name: trained.weights[swapped.get(name, name)] for name in trained.weights}
            write(replace(trained, weights=weights), *rest, **options)

        monkeypatch.setattr(module, writer, write_swapped)
        with pytest.raises(RunError, match="a weight of the exported model differs"):
            export_form(found, runs["llama"], tmp_path / "out", form)
    assert not list(tmp_path.iterdir())


# --- what a form costs ---


def test_the_loss_of_a_form_is_that_of_the_model_others_load(
    runs: dict[str, Path], trained: TrainedModel, tmp_path: Path
) -> None:
    corpus = Corpus(write_heldout(trained.tokenizer, tmp_path / "heldout"))
    found = exported(runs["llama"], tmp_path / "out", INT8, heldout=corpus, heldout_tokens=120)
    assert found.loss is not None
    assert found.loss.cost != 0
    assert abs(found.loss.cost) < 0.05
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.tensor([trained.tokenizer.encode_document(TEXTS[0])[:40]])
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(loaded(ids[:, :-1]).logits[0], ids[0, 1:]).item()
    first = heldout_loss(trained, exported_weights(tmp_path / "out", trained.config.model), corpus, 40)
    assert first.tokens == 39
    assert first.exported == pytest.approx(expected, abs=1e-6)
    assert abs(first.checkpoint - expected) > 5e-6
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"{found.loss.exported:.5f}" in text
    assert f"{found.loss.cost:+.5f}" in text


def test_fp32_costs_nothing(runs: dict[str, Path], trained: TrainedModel, tmp_path: Path) -> None:
    corpus = Corpus(write_heldout(trained.tokenizer, tmp_path / "heldout"))
    form = Form(Format.hugging_face, Stored.fp32)
    found = exported(runs["llama"], tmp_path / "out", form, heldout=corpus, heldout_tokens=200)
    assert found.weight_error == 0
    assert found.loss is not None
    assert found.loss.cost == 0


def test_held_out_text_of_another_tokenizer_is_refused(
    runs: dict[str, Path], trained: TrainedModel, tmp_path: Path
) -> None:
    corpus = Corpus(write_heldout(trained.tokenizer, tmp_path / "heldout"))
    corpus.manifest.tokenizer_sha256 = "0" * 64
    with pytest.raises(ConfigError, match=r"heldout=.*different tokenizer"):
        exported(runs["llama"], tmp_path / "out", F16, heldout=corpus, heldout_tokens=50)
    assert not (tmp_path / "out").exists()


def test_the_script_prints_what_the_form_costs(
    runs: dict[str, Path], trained: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = script("export")
    corpus = Corpus(write_heldout(trained.tokenizer, tmp_path / "heldout"))
    options = {"run_dir": str(runs["llama"]), "format": Format.gguf, "dtype": Stored.int8}
    launch.main(
        launch.ExportConfig(
            output=str(tmp_path / "a"), heldout=str(corpus.manifest_path), heldout_tokens=100, **options
        )
    )
    printed = capsys.readouterr().out
    assert "held-out loss as GGUF Q8_0" in printed
    assert "logits differ by at most" in printed
    launch.main(launch.ExportConfig(output=str(tmp_path / "b"), **options))  # the run names no held-out text
    assert "was not measured" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="heldout_tokens=-1"):
        launch.ExportConfig(output="o", run_dir="r", heldout_tokens=-1)


# --- memory ---


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with weights of 200 MB in fp32, each of which has at most 1.4 MB."""
    folder = tmp_path_factory.mktemp("large")
    make_run(folder, ModelConfig(n_layers=32, d_model=384, n_heads=4, d_ff=896))
    return folder


@pytest.mark.parametrize(
    "form", [Form(Format.hugging_face, Stored.bf16), INT8, Q8_0], ids=["bf16", "int8", "q8_0"]
)
def test_a_model_is_not_held_whole(
    runs: dict[str, Path], large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Form
) -> None:
    """VmHWM counts pages of mapped files, too. What a form holds whole would be a quarter of the weights and more."""
    n_bytes = sum(path.stat().st_size for path in large.rglob("*.safetensors"))
    assert n_bytes > 200_000_000
    monkeypatch.setattr("pretrain.convert.hugging_face.WHOLE_MODEL_BYTES", 0)
    exported(runs["llama"], tmp_path / "small", form)  # what is imported at first use does not count
    before = peak_bytes(reset=True)
    exported(large, tmp_path / "out", form, max_shard_bytes=10_000_000)
    assert peak_bytes() - before < 0.2 * n_bytes
