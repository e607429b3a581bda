"""Tokenizers in GGUF give the same tokens to another reader, and what GGUF lacks is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Theirs

from data_tools.building.import_tokenizer import import_tokenizer
from data_tools.config import TokenizerConfig
from pretrain.convert.gguf import GgufType, write_gguf
from pretrain.convert.gguf_tokenizer import _LLAMA3, _QWEN2, check_gguf_tokenizer, gguf_vocabulary
from pretrain.corpus.tokenizer import CHECK_TEXT, Tokenizer
from pretrain.errors import ConfigError, RunError
from pretrain.trained import TrainedModel, load_trained
from support.trained_run import SMALL, make_run, train_tokenizer, train_with_options

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

SAMPLE = [
    CHECK_TEXT,
    "The 1,234 wives' 56789 fortunes weren't    there.\n\n\tif (a != 0x1F) { return; }\r\n",
] * 3


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


KINDS: dict[str, Any] = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": split(_QWEN2),
    "llama-bpe": split(_LLAMA3),
}


def byte_level(folder: Path, kind: str, change: Callable[[Theirs], None] = lambda theirs: None) -> Tokenizer:
    theirs = Theirs(models.BPE(ignore_merges=kind == "llama-bpe"))
    theirs.pre_tokenizer, theirs.decoder = KINDS[kind], decoders.ByteLevel()
    if kind == "qwen2":
        theirs.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator(SAMPLE, trainer)
    theirs.add_tokens([AddedToken("<think>", normalized=False)])
    change(theirs)
    folder.mkdir(parents=True, exist_ok=True)
    theirs.save(str(folder / "tokenizer.json"))
    return import_tokenizer(TokenizerConfig(path=str(folder), eos_token="<|endoftext|>"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    folder = tmp_path_factory.mktemp("run")
    make_run(folder, replace(SMALL, vocab_size=512))
    return load_trained(folder)


def written(small: TrainedModel, tokenizer: Tokenizer, path: Path) -> Path:
    write_gguf(replace(small, tokenizer=tokenizer), path, GgufType.f16)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_byte_level_bpe_has_the_name_of_its_pre_tokenizer(
    small: TrainedModel, tmp_path: Path, kind: str
) -> None:
    tokenizer = byte_level(tmp_path, kind)
    path = written(small, tokenizer, tmp_path / "model.gguf")
    check_gguf_tokenizer(tokenizer, path)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == kind
    assert len(fields["tokenizer.ggml.tokens"]) == 512
    types = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    assert types["<|endoftext|>"] == 3
    assert types["<think>"] == 4
    assert types["e"] == 1
    assert types["[PAD511]"] == 5
    assert fields["tokenizer.ggml.bos_token_id"] == fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_id


def test_a_wrong_vocabulary_is_noticed(small: TrainedModel, tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path / "a", "gpt-2")
    with_other = byte_level(tmp_path / "b", "llama-bpe")
    path = written(small, with_other, tmp_path / "model.gguf")
    with pytest.raises(RunError, match="the tokenizer in the GGUF file differs"):
        check_gguf_tokenizer(tokenizer, path)
    pieces = train_tokenizer(tmp_path / "tokenizer.model")
    path = written(small, pieces, tmp_path / "pieces.gguf")
    check_gguf_tokenizer(pieces, path)
    with pytest.raises(RunError, match="token 3"):
        check_gguf_tokenizer(train_tokenizer(tmp_path / "other.model", vocab_size=380), path)


def no_bytes(theirs: Theirs) -> None:
    theirs.pre_tokenizer = pre_tokenizers.Whitespace()


def prefix_space(theirs: Theirs) -> None:
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def lower_case(theirs: Theirs) -> None:
    theirs.normalizer = normalizers.Lowercase()


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        ("gpt-2", no_bytes, "steps: Whitespace"),
        ("gpt-2", prefix_space, "steps: ByteLevel"),
        ("gpt-2", lower_case, "normalizer: Lowercase"),
        ("llama-bpe", lambda theirs: setattr(theirs.model, "ignore_merges", False), "ignore_merges: False"),
    ],
)
def test_a_pre_tokenizer_without_a_name_is_refused(
    tmp_path: Path, kind: str, change: Callable[[Theirs], None], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        gguf_vocabulary(byte_level(tmp_path, kind, change))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model_type": "unigram", "byte_fallback": True}, "unigram"),
        ({"model_type": "bpe"}, "no bytes"),
        ({"model_type": "bpe", "byte_fallback": True}, "normalization"),  # the default: NFKC, single spaces
    ],
)
def test_a_sentencepiece_model_that_gguf_lacks_is_refused(
    tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    other = train_with_options(tmp_path / "other.model", **options)
    with pytest.raises(ConfigError, match=f"{named}.*format=hugging_face"):
        gguf_vocabulary(other)


def test_a_unigram_model_in_tokenizer_json_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path, "gpt-2")
    description = json.loads(tokenizer.content)
    description["model"] = {"type": "Unigram", "vocab": [["<|endoftext|>", 0.0], ["a", -1.0]], "unk_id": 0}
    tokenizer.content = json.dumps(description).encode()
    with pytest.raises(ConfigError, match="Unigram"):
        gguf_vocabulary(tokenizer)
