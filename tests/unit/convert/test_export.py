"""The exported folder as `transformers` sees it: the same logits, the same tokens, or no folder at all."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from data_tools.building.import_tokenizer import import_tokenizer
from data_tools.config import TokenizerConfig
from pretrain.config import ModelConfig, RopeScalingConfig, RopeType
from pretrain.convert import hugging_face as export_module
from pretrain.convert.hugging_face import CHECK_TEXT, check_tokenizer, compare_logits, export, write_tokenizer
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.errors import ConfigError, RunError
from pretrain.generation.fill_mask import fill_masks
from pretrain.trained import TrainedModel, load_trained
from support.trained_run import (
    SMALL,
    TEXTS,
    make_run,
    run_script,
    script,
    train_tokenizer,
    train_with_options,
)

transformers = pytest.importorskip("transformers")

LLAMA3 = RopeScalingConfig(rope_type=RopeType.llama3, factor=8.0, original_max_position_embeddings=32)
MODELS = {
    "grouped": SMALL,
    "multi_head_wide": replace(SMALL, n_kv_heads=None, d_head=20),
    "tied": replace(SMALL, tie_embeddings=True),
    "rope_and_eps": replace(SMALL, rope_theta=500.0, norm_eps=1e-3),
    "qk_norm": replace(SMALL, qk_norm=True),
    "biases": replace(SMALL, attention_bias=True, d_head=20),
    "llama3": replace(SMALL, rope_scaling=LLAMA3),
    "qk_norm_tied_wide": replace(SMALL, qk_norm=True, tie_embeddings=True, n_kv_heads=1, d_head=12),
}
models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def trained_model(folder: Path, model: ModelConfig = SMALL) -> TrainedModel:
    make_run(folder / "run", replace(model))
    return load_trained(folder / "run")


def hidden_files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


# --- the model ---


@models
def test_transformers_gives_the_same_logits(tmp_path: Path, model: ModelConfig) -> None:
    """The reference test of the whole model: an independent implementation, fed the exported weights."""
    expected = make_run(tmp_path / "run", replace(model))
    parity = export(load_trained(tmp_path / "run"), tmp_path / "hf", dtype=torch.float32)
    assert parity.holds
    assert parity.max_difference < 2e-5
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    family = "Qwen3" if model.qk_norm else "SeedOss" if model.attention_bias else "Llama"
    assert type(loaded).__name__ == f"{family}ForCausalLM"
    assert loaded.dtype == torch.float32
    tokens = torch.randint(0, 400, (3, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = expected.logits(tokens), loaded(tokens).logits
    assert ours.abs().max() > 1
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-5)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in expected.parameters())


@pytest.mark.parametrize("name", ["grouped", "tied", "rope_and_eps", "multi_head_wide", "qk_norm"])
def test_a_model_that_fills_masks_gives_the_same_logits(tmp_path: Path, name: str) -> None:
    """Without code of ours: EuroBERT is Llama with attention in both directions; Qwen3 can be told to have it."""
    expected = make_run(tmp_path / "run", replace(MODELS[name]), objective="mlm")
    parity = export(load_trained(tmp_path / "run"), tmp_path / "hf", dtype=torch.float32)
    assert parity.holds
    assert parity.max_difference < 2e-5
    auto = transformers.AutoModelForCausalLM if name == "qk_norm" else transformers.AutoModelForMaskedLM
    loaded = auto.from_pretrained(tmp_path / "hf")
    assert type(loaded).__name__ == ("Qwen3ForCausalLM" if name == "qk_norm" else "EuroBertForMaskedLM")
    tokens = torch.randint(0, 400, (3, 50), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, -1] = (tokens[:, -1] + 1) % 400
    with torch.no_grad():
        ours, theirs = expected.logits(tokens), loaded(tokens).logits
        assert (loaded(changed).logits[:, 0] != theirs[:, 0]).any()  # the first token sees the last
    assert ours.abs().max() > 1
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-5)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in expected.parameters())


def test_transformers_fills_the_same_masks(tmp_path: Path) -> None:
    """Its own pipeline on the exported folder, from the text on: the same tokens with the same probabilities."""
    make_run(tmp_path / "run", objective="mlm")
    trained = load_trained(tmp_path / "run")
    export(trained, tmp_path / "hf", dtype=torch.float32)
    assert not (tmp_path / "hf" / "generation_config.json").exists()
    pipeline = transformers.pipeline("fill-mask", model=str(tmp_path / "hf"), top_k=60)
    model = trained.decoder(torch.device("cpu"), torch.float32)
    for text in ("It is a <mask> universally <mask>.", "<mask>", "道可<mask>,非常道。\n", "a</b> <mask>"):
        ours = fill_masks(model, trained.tokenizer, text, 5)
        theirs = pipeline(text)
        theirs = theirs if isinstance(theirs[0], list) else [theirs]
        # It also offers special tokens, and rows of the embedding without a token.
        theirs = [[c for c in mask if 5 <= c["token"] < 400][:5] for mask in theirs]
        assert [[c.token for c in mask] for mask in ours] == [[c["token"] for c in mask] for mask in theirs]
        found, expected = ([c["score"] for m in theirs for c in m], [c.probability for m in ours for c in m])
        assert found == pytest.approx(expected, rel=1e-4)


def test_transformers_without_the_class_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run", objective="mlm")
    monkeypatch.setattr(export_module, "architecture", lambda *_: "NoSuchClassForMaskedLM")
    with pytest.raises(ConfigError, match="has no NoSuchClassForMaskedLM"):
        export(load_trained(tmp_path / "run"), tmp_path / "hf", dtype=torch.float32)
    assert not (tmp_path / "hf").exists()


def test_a_model_with_biases_is_a_qwen2_where_its_tokenizer_is_like_qwens(tmp_path: Path) -> None:
    """Beside a Qwen2 model, AutoTokenizer takes the vocabulary only, and cuts words as Qwen does."""
    own = transformers.Qwen2Tokenizer(extra_special_tokens=["<s>"])
    made = own.backend_tokenizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    trained = trained_model(tmp_path, replace(SMALL, attention_bias=True))
    for name, regex in (("qwen2", None), ("seed_oss", "[0-9]|[^0-9]+")):
        (tmp_path / name).mkdir()
        if regex is not None:
            split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(regex), behavior="isolated")
            level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, level])
            made.train_from_iterator(TEXTS, trainer)
        made.save(str(tmp_path / name / "tokenizer.json"))
        options = TokenizerConfig(path=str(tmp_path / name), bos_token="<s>", eos_token="<|endoftext|>")
        exported = replace(trained, tokenizer=import_tokenizer(options))
        assert export(exported, tmp_path / f"hf-{name}", dtype=torch.float32).holds
        assert json.loads((tmp_path / f"hf-{name}" / "config.json").read_text())["model_type"] == name


def test_bf16_export_is_the_rounded_model(tmp_path: Path) -> None:
    trained = trained_model(tmp_path)
    parity = export(trained, tmp_path / "hf", dtype=torch.bfloat16)
    assert parity.holds
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert torch.equal(weights["lm_head.weight"], trained.weights["head.weight"].bfloat16())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert loaded.dtype == torch.bfloat16


def test_large_models_are_written_in_several_files(tmp_path: Path) -> None:
    trained = trained_model(tmp_path)
    parity = export(trained, tmp_path / "hf", dtype=torch.float32, max_shard_bytes=40_000)
    assert parity.holds
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}


def test_the_configuration_says_what_the_model_is(tmp_path: Path) -> None:
    export(trained_model(tmp_path), tmp_path / "hf", dtype=torch.float32)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["max_position_embeddings"] == 64
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 3)
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)
    assert generation["max_length"] == 64
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == (
        tmp_path / "run" / "tokenizer.model"
    ).read_bytes()


# --- published as a whole or not at all ---


def damaged(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1.0


def not_a_number(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"][0] = float("nan")


@pytest.mark.parametrize("damage", [damaged, not_a_number])
def test_another_model_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any) -> None:
    trained = trained_model(tmp_path)
    write = export_module.write_model

    def write_damaged(trained: TrainedModel, folder: Path, *rest: Any) -> None:
        write(trained, folder, *rest)
        weights = load_file(folder / "model.safetensors")
        damage(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(export_module, "write_model", write_damaged)
    with pytest.raises(RunError, match="differs from the trained one"):
        export(trained, tmp_path / "hf", dtype=torch.float32)
    assert not (tmp_path / "hf").exists()
    assert not hidden_files(tmp_path)


def test_existing_output_is_replaced_only_on_request_and_only_by_a_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, output = trained_model(tmp_path), tmp_path / "hf"
    output.mkdir()
    export(trained, output, dtype=torch.float32)  # an empty folder may be filled
    (output / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="overwrite=true"):
        export(trained, output, dtype=torch.float32)
    monkeypatch.setattr(export_module, "RELATIVE_TOLERANCE", -1.0)
    with pytest.raises(RunError):
        export(trained, output, dtype=torch.float32, overwrite=True)
    assert (output / "mine.txt").read_text() == "keep"
    monkeypatch.undo()
    export(trained, output, dtype=torch.float32, overwrite=True)
    assert not (output / "mine.txt").exists()
    assert (output / "config.json").exists()
    assert not hidden_files(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        export(trained, tmp_path / "file", dtype=torch.float32)


def test_parity_sees_a_wrong_rotary_base(tmp_path: Path) -> None:
    trained = trained_model(tmp_path)
    export(trained, tmp_path / "hf", dtype=torch.float32)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 20000.0
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert not compare_logits(trained, tmp_path / "hf", torch.float32).holds


# --- the tokenizer ---

EDGE_TEXTS = [
    "",
    " ",
    "\n",
    "\n\n  \n\t x",
    "  two  spaces   three    four\n        eight\n",
    "a\u2581b \u2581",
    "<s></s><pad><unk><0x0A>",
    "👩‍👩‍👧‍👦 🎉 émigré naïve",
    "中文,測試。\u3000全形空格",
    "\x00\x01\r\n\x7f\ufeff",
    "12345.678 0x1F",
    "aaaaaaaaaaaaa aaaa aaaaaa",
    CHECK_TEXT,
]


def exported_tokenizer(tokenizer: Tokenizer, folder: Path) -> Any:
    folder.mkdir()
    write_tokenizer(tokenizer, folder, max_tokens=10**9)
    return transformers.AutoTokenizer.from_pretrained(folder)


def random_texts(n: int) -> list[str]:
    draw, base = random.Random(0), "".join(TEXTS)
    alphabets = [base, "ab \n", "etaoin  ", base + "é字\u2581<>0xA👍\x00"]
    texts = ["".join(draw.choices(draw.choice(alphabets), k=draw.randrange(80))) for _ in range(n)]
    starts = [draw.randrange(len(base)) for _ in range(n)]
    return texts + [base[start : start + draw.randrange(200)] for start in starts]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize(("vocab_size", "coverage"), [(370, 0.98), (480, 1.0)])
def test_the_tokenizer_encodes_and_decodes_as_ours(
    tmp_path: Path, model_type: str, vocab_size: int, coverage: float
) -> None:
    ours = train_tokenizer(tmp_path / "tokenizer.model", model_type, vocab_size, coverage)
    theirs = exported_tokenizer(ours, tmp_path / "hf")
    assert len(theirs) == ours.vocab_size
    texts = TEXTS + EDGE_TEXTS + random_texts(1000)
    reordered = 0
    for text in texts:
        expected = [1, *ours.encode(text)]
        found = theirs.encode(text)
        if found != expected and model_type == "unigram":  # equally probable: rounding decides the order
            reordered += 1
            assert sorted(found) == sorted(expected), text
        else:
            assert found == expected, text
        assert theirs.decode(ours.encode_document(text), skip_special_tokens=True) == text
    assert reordered <= 0.005 * len(texts)


def test_the_tokenizer_knows_its_special_tokens(tmp_path: Path) -> None:
    theirs = exported_tokenizer(train_tokenizer(tmp_path / "tokenizer.model"), tmp_path / "hf")
    assert (theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        0,
        1,
        2,
        3,
    )
    assert theirs.decode([1, 2], skip_special_tokens=False) == "<s></s>"
    assert theirs("a", add_special_tokens=False).input_ids == theirs("a").input_ids[1:]
    padded = theirs(["a wife", "a"], padding=True)
    assert padded.input_ids[1][0] == 3
    assert padded.attention_mask[1][0] == 0


def test_a_wrong_tokenizer_is_noticed(tmp_path: Path) -> None:
    ours = train_tokenizer(tmp_path / "tokenizer.model")
    exported_tokenizer(ours, tmp_path / "hf")
    check_tokenizer(ours, tmp_path / "hf")
    other = train_tokenizer(tmp_path / "other.model", vocab_size=380)
    with pytest.raises(RunError, match="the exported tokenizer differs"):
        check_tokenizer(other, tmp_path / "hf")


IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
OTHERS = {
    "Llama 2": IDENTITY | {"model_type": "bpe", "split_digits": True},
    "Gemma": IDENTITY
    | {"model_type": "bpe", "add_dummy_prefix": False, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
    | {"user_defined_symbols": ["<mask>", "\u2581\u2581", "\n\n"]},
    "a unigram model with a prefix": IDENTITY | {"model_type": "unigram"},
    "T5": {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    "compatibility characters": {"model_type": "bpe", "byte_fallback": True},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_a_sentencepiece_model_of_others_does_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    """The text comes from `CHECK_TEXT`, so that it has the characters."""
    ours = train_with_options(tmp_path / "other.model", **options)
    theirs = exported_tokenizer(ours, tmp_path / "hf")
    check_tokenizer(ours, tmp_path / "hf")
    ids = (ours.bos_id, ours.eos_id, ours.pad_id, ours.unk_id)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id) == ids
    for text in (
        "",
        "wife",
        " wife",
        "a  wife  ",
        "\n\nx\n y",
        "<mask>x",
        "\ufb01ne \u2460",
        "a <s>b</s>",
        *TEXTS,
    ):
        assert theirs.encode(text) == [ours.bos_id, *ours.encode(text)], text
        assert theirs.decode(theirs.encode(text), skip_special_tokens=True) == ours.decode(ours.encode(text))


# --- launch/export.py ---


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [([], "float32"), (["dtype=bf16"], "bfloat16"), (["dtype=fp16"], "float16")],  # the run computed in fp32
)
def test_the_script_exports_and_says_how_well_it_agrees(
    tmp_path: Path, arguments: list[str], dtype: str
) -> None:
    make_run(tmp_path / "run")
    run, output = f"run_dir={tmp_path / 'run'}", f"output={tmp_path / 'hf'}"
    done = run_script("export", run, output, *arguments)
    assert done.returncode == 0, done.stderr
    assert "logits differ by at most" in done.stdout
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == dtype
    export_script = script("export")
    with pytest.raises(ConfigError, match="overwrite=true"):
        export_script.main(
            export_script.ExportConfig(run_dir=str(tmp_path / "run"), output=str(tmp_path / "hf"))
        )


def test_without_transformers_one_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        sys.modules, "transformers", None
    )  # what importing it finds where it is not installed
    export_script = script("export")
    with pytest.raises(ConfigError, match=r"pip install 'pretrain\[eval\]'"):
        export_script.main(export_script.ExportConfig(run_dir=str(tmp_path), output=str(tmp_path / "hf")))
    assert not (tmp_path / "hf").exists()
