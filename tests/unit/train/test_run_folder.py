"""The files that make the folders of a run readable for every command."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.config import TrainConfig, load_config
from pretrain.corpus.chat import OWN_TEMPLATE
from pretrain.corpus.chat_template import CHAT_TEMPLATE_NAME, template_in
from pretrain.corpus.manifest import load_manifest
from pretrain.corpus.tokenizer import Tokenizer, tokenizer_in
from pretrain.train.run_folder import write_run_files
from support.tiny import TinyCorpus, run_arguments


@pytest.mark.parametrize("is_adapted", [False, True])
def test_the_frozen_weights_have_the_tokenizer_and_the_template(
    corpus: TinyCorpus, tmp_path: Path, is_adapted: bool
) -> None:
    """An export of `base/` is then what the exported adapters belong on, dialogues included."""
    init_from, run_dir = tmp_path / "init", tmp_path / "run"
    init_from.mkdir()
    run_dir.mkdir()
    (init_from / CHAT_TEMPLATE_NAME).write_text(OWN_TEMPLATE)
    words = run_arguments(corpus, run_dir, f"init_from={init_from}", *["lora.r=4"] * is_adapted)
    config, manifests = (
        load_config(TrainConfig, words, "config"),
        {str(corpus.manifest): load_manifest(corpus.manifest)},
    )
    sha256 = manifests[str(corpus.manifest)].tokenizer_sha256
    assert write_run_files(config, run_dir, None, sha256, manifests)["attempt"] == 1
    folders = [run_dir, run_dir / "base"] if is_adapted else [run_dir]
    assert [path for path in run_dir.iterdir() if path.is_dir()] == folders[1:]
    for folder in folders:
        assert template_in(folder) == OWN_TEMPLATE
        assert Tokenizer(tokenizer_in(folder), sha256=sha256).vocab_size > 0
