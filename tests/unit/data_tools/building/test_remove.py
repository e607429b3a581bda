"""Documents are taken out of a prepared corpus: from shards, held-out part, text, manifest and card."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from data_tools.config import TokenizerConfig
from data_tools.prepare import prepare
from data_tools.remove import remove
from data_tools.verify import verify
from pretrain.corpus.manifest import load_manifest
from pretrain.corpus.shards import Corpus, documents_of
from pretrain.errors import ConfigError
from support.preparing import ENGLISH, all_documents, config, content, run, write_jsonl


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A corpus of two sources in several small shards, a fifth of it held out."""
    texts = [f"{ENGLISH} " * (1 + n % 7) for n in range(300)]
    records = [{"id": f"doc-{n}", "text": text.format(*[n] * 9)} for n, text in enumerate(texts)]
    source = write_jsonl(tmp_path / "prose.jsonl", records)
    text = "Another source has other documents, this is {}."
    other = write_jsonl(
        tmp_path / "more.jsonl", [{"id": f"other-{n}", "text": text.format(n)} for n in range(60)]
    )
    options = config(
        tmp_path / "corpus",
        source,
        other,
        chunk_tokens=256,
        shard_bytes=8192,
        heldout_frac=0.2,
        tokenizer=TokenizerConfig(vocab_size=400),
    )
    assert prepare(options) == 0
    return tmp_path / "corpus"


def test_documents_come_out_as_they_went_in(prepared: Path) -> None:
    corpus = Corpus(prepared / "manifest.json")
    documents = list(documents_of(corpus))
    assert len(documents) == corpus.manifest.n_documents
    assert sum(len(document.tokens) for document in documents) == corpus.manifest.n_tokens
    assert any(len(document.tokens) > corpus.chunk_tokens // 2 for document in documents)


def test_what_is_removed_is_nowhere_and_all_else_is_as_before(prepared: Path, tmp_path: Path) -> None:
    before, manifest = all_documents(prepared), load_manifest(prepared / "manifest.json")
    heldout_ids = [json.loads(line)["id"] for line in gzip.open(prepared / "heldout/documents.jsonl.gz")]  # noqa: SIM115
    in_training = [document.id for document in documents_of(Corpus(prepared / "manifest.json"))]
    gone = {in_training[150], in_training[151], in_training[-1], heldout_ids[3]}
    shards = content(prepared / "shards")
    ids = tmp_path / "ids.txt"
    ids.write_text("\n".join([*gone, "", "never-there"]) + "\n")
    done = run(str(prepared), "--ids", str(ids), module="remove")
    assert done.returncode == 0, done.stderr
    assert "4 documents removed; 1 of the ids are not in the corpus" in done.stdout

    after = all_documents(prepared)
    assert after == {name: value for name, value in before.items() if name not in gone}
    assert not any(
        name.encode() in path.read_bytes() for name in gone for path in (prepared / "shards").iterdir()
    )
    assert (
        heldout_ids[3] not in gzip.decompress((prepared / "heldout/documents.jsonl.gz").read_bytes()).decode()
    )
    assert verify(prepared) == []
    new = load_manifest(prepared / "manifest.json")
    assert new.n_documents == manifest.n_documents - 3
    assert new.root_sha256 != manifest.root_sha256
    first = "shard-00000.tar"
    assert content(prepared / "shards")[first] == shards[first]
    assert f"documents: {new.n_documents:,}" in (prepared / "README.md").read_text()
    assert "-4 removed later" in (prepared / "README.md").read_text().replace(" " * 10, "")
    assert not (prepared / ".work").exists()


def test_an_id_that_is_not_there_changes_nothing(prepared: Path) -> None:
    before = content(prepared)
    assert not remove(prepared, {"never-there"})
    assert content(prepared) == before


def test_a_prepared_corpus_does_not_get_them_back_by_itself(prepared: Path) -> None:
    """The same preparation finds the corpus finished."""
    name = next(iter(all_documents(prepared)))
    assert remove(prepared, {name}) == {name: 1}
    inputs = (prepared.parent / "prose.jsonl", prepared.parent / "more.jsonl")
    options = {"chunk_tokens": 256, "shard_bytes": 8192, "heldout_frac": 0.2}
    assert prepare(config(prepared, *inputs, **options, tokenizer=TokenizerConfig(vocab_size=400))) == 0
    assert name not in all_documents(prepared)


def test_wrong_input_is_one_sentence(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for arguments, words in (
        ((str(prepared), "--ids", str(tmp_path / "empty")), "names no document"),
        ((str(prepared), "--ids", str(tmp_path / "none")), "cannot be read: No such file"),
        ((str(tmp_path), "--ids", str(prepared / "README.md")), "holds no manifest.json"),
    ):
        done = run(*arguments, module="remove")
        assert done.returncode == 2
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1
    with pytest.raises(ConfigError, match="would be left without a document"):
        remove(prepared, set(all_documents(prepared)))
    assert verify(prepared) == []
