"""Labeled texts become documents with one class each: nothing of a label is lost, and what is cut is counted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.building.classes import classes_of
from data_tools.config import DocumentFormat, LabelsConfig, TokenizerConfig
from data_tools.prepare import prepare
from data_tools.show import describe_chunk
from pretrain.corpus.check import verify_corpus
from pretrain.corpus.labels import beginning, labeled_documents
from pretrain.corpus.manifest import Manifest, load_manifest
from pretrain.corpus.shards import Corpus, documents_of
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.errors import ConfigError
from support.labeled import CLASSES, MAX_TOKENS, labeled_config, labeled_records
from support.preparing import config, write_jsonl
from support.tiny import TinyCorpus


def test_each_text_is_one_document_with_its_class(labeled: TinyCorpus) -> None:
    records = {record["id"]: record for record in labeled_records()}
    tokenizer = Tokenizer.trusted(labeled.folder / "tokenizer.model")
    seen = set()
    n_cut = 0
    for path in (labeled.manifest, labeled.heldout):
        corpus = Corpus(path)
        assert corpus.manifest.classes == CLASSES
        for found in documents_of(corpus):
            record = records[found.id]
            seen.add(found.id)
            whole = np.array(tokenizer.encode_document(str(record["text"])))
            tokens = found.tokens[:-1]
            n_cut += len(tokens) < len(whole)
            assert len(found.tokens) <= MAX_TOKENS
            assert len(tokens) == min(len(whole), MAX_TOKENS - 1)
            assert np.array_equal(tokens[:-1], whole[: len(tokens) - 1])
            assert tokens[-1] == tokenizer.eos_id
            assert CLASSES[found.tokens[-1]] == record["label"]
            assert found.is_target is not None and found.is_target.tolist() == [False] * len(tokens) + [True]
            text = tokenizer.decode(tokens.tolist())
            assert found.text_bytes == len(text.encode())
    assert seen == set(records)
    packed = load_manifest(labeled.manifest).packed
    assert packed is not None
    assert (packed.sequence_tokens, packed.cut_documents, n_cut) == (MAX_TOKENS, 30, 30)


def test_the_report_counts_what_was_cut_and_held_out_texts_keep_their_labels(labeled: TinyCorpus) -> None:
    report = json.loads((labeled.folder / "prepare.json").read_text())
    assert report["funnel"]["shortened"] == 30
    assert any("30 of them cut to their start" in line for line in report["summary"])
    records = {record["id"]: record for record in labeled_records()}
    with gzip.open(labeled.folder / "heldout" / "documents.jsonl.gz", "rt") as lines:
        held = [json.loads(line) for line in lines]
    assert len(held) == report["funnel"]["heldout"] > 20
    assert all(
        (one["text"], one["label"]) == (records[one["id"]]["text"], records[one["id"]]["label"])
        for one in held
    )


def test_it_is_verified_and_shown_with_its_labels(labeled: TinyCorpus) -> None:
    assert verify_corpus(labeled.manifest) == []
    corpus = Corpus(labeled.manifest)
    text = describe_chunk(corpus, Tokenizer.trusted(labeled.folder / "tokenizer.model"), 0)
    first = next(labeled_documents(corpus))
    assert f"⟦{CLASSES[first.label]}⟧" in text
    assert "bad, good, so-so" in (labeled.folder / "README.md").read_text()


def test_the_manifest_of_other_corpora_stays_as_it_was(labeled: TinyCorpus) -> None:
    content = json.loads(labeled.manifest.read_text())
    assert content["classes"] == CLASSES
    text = json.loads(labeled.manifest.read_text())
    for key in ("classes", "loss_mask", "packed"):
        del text[key]
    plain = Manifest(**{**text, "sources": [], "shards": [], "files": []})
    assert not {"classes", "loss_mask", "packed"} & json.loads(plain.to_json()).keys()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": []}, ["its classes"]),
        ({"classes": ["bad", "bad", "good"]}, ["its classes"]),
        ({"loss_mask": False}, ["its classes"]),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    labeled: TinyCorpus, changes: dict[str, object], words: list[str]
) -> None:
    manifest = load_manifest(labeled.manifest)
    if changes == {"classes": []}:
        manifest.packed, manifest.loss_mask = None, True
    for key, value in changes.items():
        setattr(manifest, key, value or manifest.classes)
    if changes.get("loss_mask") is False:
        manifest.loss_mask = False
    manifest.root_sha256 = manifest.compute_root_sha256()
    with pytest.raises(ConfigError) as raised:
        Manifest.from_json(manifest.to_json())
    assert all(word in str(raised.value) for word in words), raised.value


@given(st.lists(st.integers(5, 99), max_size=40), st.integers(4, 50))
def test_the_start_of_a_long_document_is_kept_with_its_end(text: list[int], max_tokens: int) -> None:
    tokens = np.array([1, *text, 2])
    kept = beginning(tokens, max_tokens, 2)
    assert len(kept) == min(len(tokens), max_tokens - 1)
    assert kept[-1] == 2 == tokens[-1]
    assert np.array_equal(kept[:-1], tokens[: len(kept) - 1])


BAD = {
    "missing": ({"text": "A text without one."}, {}, ["input.jsonl:3", "no label", "'label'", "label_field"]),
    "null": ({"text": "A text of its own.", "label": None}, {}, ["input.jsonl:3", "'None'"]),
    "fraction": ({"text": "A text of its own.", "label": 0.5}, {}, ["input.jsonl:3", "'0.5'"]),
    "true": ({"text": "A text of its own.", "label": True}, {}, ["input.jsonl:3", "'True'"]),
    "blank": ({"text": "A text of its own.", "label": " "}, {}, ["input.jsonl:3", "0 characters"]),
    "long": ({"text": "A text of its own.", "label": "x" * 101}, {}, ["input.jsonl:3", "101 characters"]),
    "unknown": (
        {"text": "A text of its own.", "label": "meh"},
        {"classes": ["good", "bad"]},
        ["input.jsonl:3", "'meh'", "good, bad"],
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_label_is_one_sentence_with_its_line(tmp_path: Path, kind: str) -> None:
    record, options, words = BAD[kind]
    good = [
        {"text": "It was a good one.", "label": "good"},
        {"text": "It was a bad one, really.", "label": "bad"},
    ]
    texts = write_jsonl(tmp_path / "input.jsonl", [*good, record])
    with pytest.raises(ConfigError) as raised:
        prepare(labeled_config(tmp_path / "corpus", texts, **options))
    assert all(word in str(raised.value) for word in words), raised.value


def test_what_cannot_be_learned_is_refused() -> None:
    options = labeled_config(Path("unused"), Path("unused"))
    nobody = np.zeros(3, np.bool_)
    for labels, heldout, words in (
        (["good"] * 3, nobody, ["'good' in all", "two classes"]),
        (["good", "bad", "meh"], np.array([False, False, True]), ["'meh'", "held-out", "heldout_frac"]),
        ([str(n) for n in range(257)], np.zeros(257, np.bool_), ["257 different values", "256"]),
    ):
        with pytest.raises(ConfigError) as raised:
            classes_of(options, labels, heldout)
        assert all(word in str(raised.value) for word in words), raised.value


def test_numbers_are_sorted_as_numbers_and_given_classes_keep_their_order() -> None:
    labels = ["10", "9", "2"]
    assert classes_of(labeled_config(Path("a"), Path("b")), labels, np.zeros(3, np.bool_)) == ["2", "9", "10"]
    given = labeled_config(Path("a"), Path("b"), classes=["10", "2", "9", "7"])
    assert classes_of(given, labels, np.zeros(3, np.bool_)) == ["10", "2", "9", "7"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"classes": ["one"]}, ["labels.classes=['one']", "two or more"]),
        ({"classes": ["a", "a"]}, ["labels.classes=['a', 'a']"]),
        ({"max_tokens": 3}, ["labels.max_tokens=3"]),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        LabelsConfig(**options)  # type: ignore[arg-type]
    assert all(word in str(raised.value) for word in words), raised.value


def test_a_chunk_must_hold_whole_sequences() -> None:
    with pytest.raises(ConfigError, match=r"chunk_tokens=100 .* labels\.max_tokens=64"):
        labeled_config(Path("a"), Path("b"), chunk_tokens=100)


def test_equal_texts_keep_the_first_label(tmp_path: Path) -> None:
    records = [*labeled_records(60), {"id": "again", "text": labeled_records(1)[0]["text"], "label": "so-so"}]
    texts = write_jsonl(tmp_path / "input.jsonl", records)
    options = labeled_config(tmp_path / "corpus", texts, tokenizer=TokenizerConfig(vocab_size=320))
    assert prepare(options) == 0
    report = json.loads((tmp_path / "corpus" / "prepare.json").read_text())
    assert report["funnel"]["dropped"] == {"duplicate": 1}


def test_files_without_fields_are_no_labeled_texts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"input=\[python\] holds no labels"):
        prepare(config(tmp_path / "corpus", "python", format=DocumentFormat.labeled))
