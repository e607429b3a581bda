"""One message of each family, word for word.

Other tests look for the key and the value in a message, so that a sentence can be improved in one place. Here the
whole sentence counts: changing one of these is a decision.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools.config import PrepareConfig
from pretrain.config.load import load_config, stored_config
from pretrain.config.run import TrainConfig
from pretrain.corpus.manifest import load_manifest
from pretrain.corpus.shards import CorruptShardError, parse_documents
from pretrain.errors import ConfigError
from pretrain.trained import load_trained


def train(*overrides: str) -> Callable[[Path], object]:
    """Loads the configuration of a run with these overrides."""
    given = ["run_dir=r", "data.manifest=m", "total_steps=1", *overrides]
    return lambda folder: load_config(TrainConfig, given, "config")


def foreign_manifest(folder: Path) -> object:
    (folder / "manifest.json").write_text("{}")
    return load_manifest(folder / "manifest.json")


FAMILIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "unknown key": (
        train("optim.weight_dekay=1"),
        "optim.weight_dekay is not a key of the configuration; did you mean weight_decay?",
    ),
    "value outside its range": (train("model.n_layers=0"), "model.n_layers=0 must be greater than 0"),
    "two keys that contradict each other": (
        train("global_batch_sequences=5", "micro_batch_sequences=2"),
        "global_batch_sequences=5 is not a multiple of micro_batch_sequences=2",
    ),
    "option of a preparation": (
        lambda folder: load_config(PrepareConfig, ["input=[x]", "output=y", "heldout_frac=0.7"]),
        "heldout_frac=0.7 is outside 0 to 0.5",
    ),
    "missing file": (
        lambda folder: load_manifest(folder / "none.json"),
        "{folder}/none.json does not exist; give the manifest.json of a prepared corpus",
    ),
    "missing run": (lambda folder: load_trained(folder / "none"), "run_dir={folder}/none does not exist"),
    "file with a schema": (
        foreign_manifest,
        "{folder}/manifest.json is not a corpus manifest: tokenizer_sha256 is missing",
    ),
    "stored configuration": (
        lambda folder: stored_config({"seed": "${oc.env:HOME}"}, "state.json"),
        "state.json: the stored configuration has '${{oc.env:HOME}}' in seed; interpolations in stored files are not "
        "resolved, since they can read this host's environment",
    ),
    "damaged shard": (
        lambda folder: parse_documents(b"{}", "a.tar: 000000.doc", n_tokens=1, n_sources=1, masked=False),
        "a.tar: 000000.doc is not a list of documents; prepare the corpus again",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_wording_of_each_family(family: str, tmp_path: Path) -> None:
    fails, sentence = FAMILIES[family]
    with pytest.raises((ConfigError, CorruptShardError)) as caught:
        fails(tmp_path)
    assert str(caught.value) == sentence.format(folder=tmp_path)
