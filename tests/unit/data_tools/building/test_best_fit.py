"""Best fit: each document once, none cut, and nearly as few sequences as are possible."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.building.best_fit import best_fit
from pretrain.corpus.check import verify_corpus
from pretrain.corpus.manifest import load_manifest
from pretrain.corpus.shards import Corpus, documents_of
from support.whole import LENGTH, whole_documents, write_whole


def n_sequences(sizes: list[int], length: int) -> int:
    """Number of sequences that a writer fills with documents of these sizes, one after another."""
    used, room = 0, 0
    for size in sizes:
        if size > room:
            used, room = used + 1, length
        room -= size
    return used


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, LENGTH), min_size=1, max_size=60),
    seed=st.integers(0, 9),
    together=st.integers(2, 30),
)
def test_documents_come_back_whole(sizes: list[int], seed: int, together: int) -> None:
    """Whether they are added one by one or together."""
    documents = whole_documents(sizes, seed)
    with tempfile.TemporaryDirectory() as name:
        corpus = Corpus(write_whole(Path(name), documents, together=together))
        one_by_one = load_manifest(write_whole(Path(name) / "b", documents))
        assert one_by_one.root_sha256 == corpus.manifest.root_sha256
        manifest = corpus.manifest
        assert verify_corpus(Path(name) / "manifest.json") == []
        found = {document.id: document for document in documents_of(corpus)}
        pieces = [corpus.documents(chunk) for chunk in range(corpus.n_chunks)]
    assert {name: one.tokens.tolist() for name, one in found.items()} == {
        name: one.tokens for name, one in documents.items()
    }
    for name, one in found.items():
        assert one.is_target is not None
        assert np.flatnonzero(one.is_target).tolist() == list(range(*documents[name].targets))
    order = best_fit(np.array(sizes), LENGTH).tolist()
    assert manifest.n_tokens == LENGTH * n_sequences([sizes[row] for row in order], LENGTH)
    assert (manifest.document_tokens, manifest.filler_tokens) == (sum(sizes), manifest.n_tokens - sum(sizes))
    assert manifest.n_tokens <= 2 * sum(sizes) + LENGTH, "two neighbors hold more than one sequence can"
    for piece in pieces:
        assert (piece.starts // LENGTH == (piece.ends - 1) // LENGTH).all(), "a document is cut"
        assert not piece.offsets.any()


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), n=st.integers(20, 60), most=st.sampled_from([40, 300, 1000]))
def test_filler_is_within_the_bound_of_best_fit(seed: int, n: int, most: int) -> None:
    """Full sequences, cut at random and shuffled, fit into as many again; 11/9 of them and 4 more are allowed."""
    random = np.random.default_rng(seed)
    sizes: list[int] = []
    for _ in range(n):
        cuts = np.sort(random.choice(np.arange(1, 1000), 1000 // most + 1, replace=False))
        sizes += np.diff([0, *cuts, 1000]).tolist()
    random.shuffle(sizes)
    order = best_fit(np.array(sizes), 1000)
    assert sorted(order.tolist()) == list(range(len(sizes)))
    used = n_sequences([sizes[row] for row in order.tolist()], 1000)
    assert n <= used <= 11 / 9 * n + 4


def test_it_needs_far_fewer_sequences_than_the_order_of_arrival_and_does_not_sort_by_length() -> None:
    sizes = np.random.default_rng(0).integers(50, 1001, 2000)
    order = best_fit(sizes, 1000)
    used = n_sequences(sizes[order].tolist(), 1000)
    least = -(-int(sizes.sum()) // 1000)
    assert used <= 1.05 * least < 1.2 * least < n_sequences(sizes.tolist(), 1000)
    thirds = [float(part.mean()) for part in np.array_split(sizes[order], 3)]
    assert max(thirds) < 1.1 * min(thirds), "long documents come first"
