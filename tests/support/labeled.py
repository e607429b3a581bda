"""Labeled texts, and corpora of them, for tests of classifiers."""

from __future__ import annotations

from pathlib import Path

from data_tools.config import DocumentFormat, LabelsConfig, PrepareConfig, TokenizerConfig
from data_tools.prepare import prepare
from pretrain.config import ModelConfig
from support.preparing import config, write_jsonl
from support.tiny import TinyCorpus
from support.trained_run import SMALL, make_run

CLASSES = ["bad", "good", "so-so"]
_WORDS = {
    "bad": ("dull", "broken", "awful"),
    "good": ("great", "lovely", "sound"),
    "so-so": ("plain", "usual", "fair"),
}
MAX_TOKENS = 64


def labeled_records(count: int = 240) -> list[dict[str, object]]:
    """Texts of three classes, each of which a word gives away, with ids; every eighth text is long."""
    records: list[dict[str, object]] = []
    for number in range(count):
        label = CLASSES[number % 3]
        text = f"Number {number} is a {_WORDS[label][number // 3 % 3]} one, they said." + " And so on." * (
            30 if number % 8 == 0 else 0
        )
        records.append({"id": f"doc-{number}", "text": text, "label": label})
    return records


def labeled_config(output: Path, *inputs: Path, **options: object) -> PrepareConfig:
    labels = LabelsConfig(max_tokens=MAX_TOKENS, classes=options.pop("classes", []))  # type: ignore[arg-type]
    return config(output, *inputs, **{"format": DocumentFormat.labeled, "labels": labels, **options})


def make_labeled(folder: Path, **options: object) -> TinyCorpus:
    """A corpus of labeled texts with held-out ones, in chunks of 1,024 tokens and sequences of 64."""
    texts = write_jsonl(folder / "labeled.jsonl", labeled_records())
    options = {"chunk_tokens": 1024, "heldout_frac": 0.2, **options}
    options.setdefault("tokenizer", TokenizerConfig(vocab_size=400))
    assert prepare(labeled_config(folder / "corpus", texts, **options)) == 0
    return TinyCorpus(folder / "corpus")


def make_base(folder: Path) -> TinyCorpus:
    """A run of a language model in `folder/run`, and labeled texts that are tokenized as it needs them."""
    make_run(folder / "run", ModelConfig(**{**_fields(SMALL), "tie_embeddings": True}))
    return make_labeled(folder, tokenizer=TokenizerConfig(path=str(folder / "run" / "tokenizer.model")))


def _fields(model: ModelConfig) -> dict[str, object]:
    names = ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff")
    return {name: getattr(model, name) for name in names}
