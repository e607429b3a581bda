"""Configuration against corpora: what does not fit is said before any process starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import TinyCorpus, make_corpus, run_arguments

from pretrain.config import ConfigError, TrainConfig, load_config
from pretrain.inputs import resolve_inputs, tokenizer_path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    return make_corpus(tmp_path_factory.mktemp("foreign"), vocab_size=500)


def configure(corpus: TinyCorpus, *more: str) -> TrainConfig:
    return load_config(TrainConfig, run_arguments(corpus, Path("unused"), *more), "config")


def test_vocabulary_is_rounded_up_to_a_multiple_of_64(corpus: TinyCorpus, foreign: TinyCorpus) -> None:
    assert resolve_inputs(configure(corpus), 1).model.vocab_size == 512
    assert resolve_inputs(configure(foreign), 1).model.vocab_size == 512
    assert resolve_inputs(configure(corpus, "model.vocab_size=1000"), 1).model.vocab_size == 1000


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model.vocab_size=511"], r"model\.vocab_size=511 is smaller than the vocabulary of .*\(512\)"),
        (["data.sequence_length=96"], r"data\.sequence_length=96 does not divide the chunks .*1024"),
        (["evaluation.manifest=/none/manifest.json"], r"/none/manifest\.json"),
        (["global_batch_sequences=6"], r"global_batch_sequences=6 .*2 x 2 ranks = 4"),
    ],
)
def test_misfits_are_named(corpus: TinyCorpus, overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        resolve_inputs(configure(corpus, *overrides), 2)


def test_heldout_text_of_another_tokenizer_is_refused(corpus: TinyCorpus, foreign: TinyCorpus) -> None:
    with pytest.raises(ConfigError, match="another tokenizer"):
        resolve_inputs(configure(corpus, f"evaluation.manifest={foreign.heldout}"), 1)


def test_a_mixture_of_tokenizers_is_refused(corpus: TinyCorpus, foreign: TinyCorpus) -> None:
    sources = (
        f"data.sources=[{{name: a, manifest: {corpus.manifest}}}, {{name: b, manifest: {foreign.manifest}}}]"
    )
    with pytest.raises(ConfigError, match="another tokenizer"):
        resolve_inputs(configure(corpus, "data.manifest=null", sources), 1)


def test_the_tokenizer_of_a_corpus_and_of_its_heldout_part(corpus: TinyCorpus, tmp_path: Path) -> None:
    assert tokenizer_path(str(corpus.manifest)) == corpus.folder.resolve() / "tokenizer.model"
    assert tokenizer_path(str(corpus.heldout)) == corpus.folder.resolve() / "tokenizer.model"
    with pytest.raises(ConfigError, match=r"has no tokenizer\.model"):
        tokenizer_path(str(tmp_path / "x" / "manifest.json"))
