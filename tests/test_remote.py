"""Corpora behind a URL: whatever a store does, no wrong byte is used, nothing waits for ever, and nothing is left over.

The server and its faults are real (faulty_server.py), on loopback.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from faulty_server import FAULTS, FaultyServer, at_rate

from pretrain.corpus_writer import CorpusWriter
from pretrain.remote import ReadOptions
from pretrain.shards import Corpus

CHUNK_TOKENS = 1024
WHOLE_CHUNK_BYTES = 2 * CHUNK_TOKENS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 60 chunks in some 10 shards."""
    folder = tmp_path_factory.mktemp("corpus")
    writer = CorpusWriter(
        folder,
        tokenizer_sha256="0" * 64,
        vocab_size=1000,
        bos_id=1,
        eos_id=2,
        chunk_tokens=CHUNK_TOKENS,
        sources=["text"],
        shard_bytes=24 * 1024,
    )
    numbers = np.random.default_rng(0)
    for number in range(60 * CHUNK_TOKENS // 300):
        writer.add_document(
            numbers.integers(0, 1000, 300), source="text", document_id=f"d{number}", text_bytes=9
        )
    writer.finish()
    return folder


def options(cache: Path, **more: object) -> ReadOptions:
    return ReadOptions(cache_dir=str(cache), **({"read_timeout_s": 10} | more))


def everything(corpus: Corpus) -> tuple[np.ndarray, list[str]]:
    """All tokens and all documents' ids of a corpus, in order."""
    tokens = [corpus.read(chunk, 0, CHUNK_TOKENS) for chunk in range(corpus.n_chunks)]
    return np.concatenate(tokens), [
        i for chunk in range(corpus.n_chunks) for i in corpus.documents(chunk).ids
    ]


def assert_same(found: Corpus, folder: Path) -> None:
    (tokens, ids), (expected, expected_ids) = everything(found), everything(Corpus(folder / "manifest.json"))
    np.testing.assert_array_equal(tokens, expected)
    assert ids == expected_ids


def cached_bytes(cache: Path) -> int:
    return sum(-(-p.stat().st_size // 4096) * 4096 for p in cache.glob("corpus-*/*"))


# --- what is read is what there is ---


def test_a_corpus_is_read_from_a_url(folder: Path, tmp_path: Path) -> None:
    with FaultyServer(folder) as server:
        corpus = Corpus(f"{server.url}/manifest.json", options=options(tmp_path))
        assert_same(corpus, folder)
        assert len(server.asked(r"\.tar")) == corpus.n_chunks  # one request for both members of a chunk
        whole = corpus.read(3, 0, CHUNK_TOKENS)
        np.testing.assert_array_equal(corpus.read(3, 100, 200), whole[100:200])
        assert len(server.asked(r"\.tar")) == corpus.n_chunks
        with pytest.raises(IndexError):
            corpus.read(corpus.n_chunks, 0, 1)


def test_a_file_url_is_a_path(folder: Path) -> None:
    corpus = Corpus(f"file://{folder}/manifest.json")
    assert corpus.manifest_path == folder / "manifest.json"
    assert_same(corpus, folder)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_at_a_high_rate_changes_nothing(folder: Path, tmp_path: Path, fault: str) -> None:
    with FaultyServer(folder, at_rate(0.3, fault)) as server:
        corpus = Corpus(f"{server.url}/manifest.json", options=options(tmp_path, prefetch_chunks=16))
        corpus.prefetch(range(corpus.n_chunks))
        assert_same(corpus, folder)
        assert {request.fault for request in server.requests} == {None, fault}


def test_all_faults_together_change_nothing(folder: Path, tmp_path: Path) -> None:
    with FaultyServer(folder, at_rate(0.3, *FAULTS)) as server:
        corpus = Corpus(f"{server.url}/manifest.json", options=options(tmp_path, prefetch_chunks=16))
        corpus.prefetch(range(corpus.n_chunks))
        assert_same(corpus, folder)
        faults = [request.fault for request in server.requests if request.fault]
        assert set(faults) == set(FAULTS)
