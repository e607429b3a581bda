"""A corpus of 60 chunks in some 20 shards, for tests that read it from a server."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pretrain.corpus.shards import Corpus
from pretrain.corpus.writer import CorpusWriter
from pretrain.remote import ReadOptions

CHUNK_TOKENS = 1024
N_CHUNKS = 60


def write_corpus(folder: Path) -> Path:
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
    for number in range(N_CHUNKS * CHUNK_TOKENS // 320):
        tokens = numbers.integers(0, 1000, 320)
        writer.add_document(tokens, source="text", document_id=f"d{number}", text_bytes=9)
    assert writer.finish().n_chunks == N_CHUNKS
    return folder


def options(cache: Path, **more: object) -> ReadOptions:
    return ReadOptions(cache_dir=str(cache), **({"read_timeout_s": 10} | more))


def everything(corpus: Corpus) -> tuple[np.ndarray, list[str]]:
    """All tokens and all document ids of a corpus, in order."""
    tokens = [corpus.read(chunk, 0, CHUNK_TOKENS) for chunk in range(corpus.n_chunks)]
    return np.concatenate(tokens), [
        i for chunk in range(corpus.n_chunks) for i in corpus.documents(chunk).ids
    ]


def assert_same(found: Corpus, folder: Path) -> None:
    """Check that every token and document is that of the corpus in the folder."""
    (tokens, ids), (expected, expected_ids) = everything(found), everything(Corpus(folder / "manifest.json"))
    np.testing.assert_array_equal(tokens, expected)
    assert ids == expected_ids
