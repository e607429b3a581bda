"""A labeled corpus serves objective=classify alone, and that objective no other corpus."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pretrain.config import TrainConfig, load_config
from pretrain.corpus.manifest import CorruptShardError, Manifest, load_manifest
from pretrain.corpus.shards import Corpus
from pretrain.data.inputs import resolve_inputs
from pretrain.data.loader import build_batch
from pretrain.errors import ConfigError
from support.labeled import CLASSES, MAX_TOKENS
from support.tiny import TinyCorpus, run_arguments
from support.trained_run import script


def resolved(corpus: TinyCorpus, *more: str) -> TrainConfig:
    return resolve_inputs(
        load_config(TrainConfig, run_arguments(corpus, Path("unused"), *more), "config"), 1
    ).config


def test_the_classes_come_from_the_corpus(labeled: TinyCorpus) -> None:
    assert resolved(labeled, "objective=classify").model.classes == CLASSES
    given = f"model.classes=[{','.join(CLASSES)}]"
    assert resolved(labeled, "objective=classify", given).model.classes == CLASSES


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["labeled with classes", "objective=causal", "format=text"]),
        (["objective=mlm"], ["labeled with classes", "objective=mlm"]),
        (["objective=classify", "model.classes=[good,bad]"], ["model.classes=['good', 'bad']", "so-so"]),
        (
            ["objective=classify", "data.sequence_length=128"],
            ["data.sequence_length=128", "64", "labels.max_tokens"],
        ),
        (["objective=classify", "data.document_masking=false"], ["data.document_masking=false", "labels"]),
        (["objective=classify", "engine.sequence_parallel_ranks=2"], ["engine.sequence_parallel_ranks"]),
        (["model.pooling=mean"], ["model.pooling=mean", "objective=causal"]),
    ],
)
def test_what_does_not_fit_is_one_sentence(labeled: TinyCorpus, options: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        resolved(labeled, *options)
    assert all(word in str(raised.value) for word in words), raised.value


def test_text_without_labels_is_refused(corpus: TinyCorpus) -> None:
    with pytest.raises(ConfigError, match=r"objective=classify needs labeled documents.*format=labeled"):
        resolved(corpus, "objective=classify")


def test_other_classes_held_out_are_refused(labeled: TinyCorpus, tmp_path: Path) -> None:
    manifest = load_manifest(labeled.heldout)
    manifest.classes = [*reversed(CLASSES)]
    other = _rewritten(manifest, tmp_path)
    with pytest.raises(ConfigError) as raised:
        resolved(labeled, "objective=classify", f"evaluation.manifest={other}")
    assert all(word in str(raised.value) for word in ("so-so, good, bad", "labels.classes")), raised.value


def _rewritten(manifest: Manifest, folder: Path) -> Path:
    manifest.root_sha256 = manifest.compute_root_sha256()
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder / "manifest.json"


def test_the_only_labels_of_a_batch_are_the_classes(labeled: TinyCorpus) -> None:
    """The label of a document is at its eos, and every document of the batch has one."""
    corpus = Corpus(labeled.manifest)
    batch = build_batch(corpus, np.zeros(4, np.int64), np.arange(4), MAX_TOKENS, True)
    is_labeled = batch.labels >= 0
    eos_id = corpus.manifest.eos_id
    assert (batch.tokens[is_labeled] == eos_id).all()
    assert set(batch.labels[is_labeled].tolist()) == {0, 1, 2}
    following = batch.tokens[:, 1:][is_labeled[:, :-1]]
    assert following.equal(batch.labels[:, :-1][is_labeled[:, :-1]])
    for row in range(4):
        labeled_documents = batch.document_ids[row][is_labeled[row]].tolist()
        assert labeled_documents == list(range(len(labeled_documents)))


def test_a_class_that_the_manifest_does_not_name_is_a_damaged_corpus(labeled: TinyCorpus) -> None:
    corpus = Corpus(labeled.manifest)
    corpus.manifest.classes = CLASSES[:2]
    with pytest.raises(CorruptShardError, match=r"of class 2.*names 2 classes"):
        build_batch(corpus, np.zeros(4, np.int64), np.arange(4), MAX_TOKENS, True)


def test_the_planner_refuses_the_objective_by_name() -> None:
    wanted = ["objective=classify", "model=tiny", "total_tokens=1000000"]
    with pytest.raises(ConfigError, match="objective=classify is not known to the planner"):
        load_config(script("plan").PlanConfig, wanted, "plan")
