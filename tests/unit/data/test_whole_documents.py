"""Sequences of whole documents: none is cut, filler is nobody's, and the loss is that of each document alone."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.batch import IGNORED_LABEL, Batch
from pretrain.config import DataConfig, MlmConfig, Packing, SourceConfig, StageConfig
from pretrain.corpus.shards import Corpus
from pretrain.data.history import ReadHistory
from pretrain.data.loader import build_batch
from pretrain.data.masking import Masking
from pretrain.data.state import OrderState
from pretrain.errors import ConfigError
from pretrain.model.decoder import Decoder
from support.texts import CHUNK, EOS, Text, data_config, make_loader
from support.trained_run import SMALL
from support.whole import LENGTH, Whole, whole_documents, write_whole

SIZES = [int(size) for size in np.random.default_rng(3).integers(2, LENGTH + 1, 400)]


@pytest.fixture(scope="module")
def documents() -> dict[str, Whole]:
    return whole_documents(SIZES)


@pytest.fixture(scope="module")
def manifest(documents: dict[str, Whole], tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_whole(tmp_path_factory.mktemp("whole"), documents)


def config(manifest: str, **values: object) -> DataConfig:
    defaults = {"sequence_length": LENGTH, "window_chunks": 4, "loader_workers": 0}
    return DataConfig(sources=[SourceConfig(name="talks", manifest=manifest)], **{**defaults, **values})


def pieces_of(batch: Batch, row: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Tokens and labels of the pieces that the document ids of a row tell apart. Each counts its positions from 0."""
    tokens, labels, positions, ids = (tensor[row].numpy() for tensor in batch[:4])
    found = []
    for number in range(ids.max() + 1):
        mine = ids == number
        assert positions[mine].tolist() == list(range(mine.sum()))
        found.append((tuple(tokens[mine].tolist()), tuple(labels[mine].tolist())))
    return found


def expected_piece(document: Whole) -> tuple[tuple[int, ...], tuple[int, ...]]:
    start, stop = document.targets
    labels = [t if start <= at < stop else IGNORED_LABEL for at, t in enumerate(document.tokens)]
    return tuple(document.tokens), (*labels[1:], IGNORED_LABEL)


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(2, LENGTH), min_size=1, max_size=70),
    lanes=st.integers(1, 7),
    times=st.sampled_from([1, 2, 4]),
    packing=st.sampled_from(Packing),
    seed=st.integers(0, 99),
)
def test_every_document_is_read_whole_and_once_per_epoch(
    sizes: list[int], lanes: int, times: int, packing: Packing, seed: int
) -> None:
    """Also where a training sequence joins several packed ones, and whatever the packing of other corpora."""
    documents = whole_documents(sizes, seed)
    with tempfile.TemporaryDirectory() as name:
        path = write_whole(Path(name), documents)
        data = config(path, lanes=lanes, packing=packing, sequence_length=times * LENGTH)
        loader = make_loader(data, seed=seed, total_steps=None, total_epochs=2, global_batch_sequences=4)
        batches = [batch for step in loader.steps(1) for batch in step]
    filler = times * LENGTH * loader.plan[loader.n_steps].samples_seen
    read: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    for batch in batches:
        for row in range(len(batch.tokens)):
            for tokens, labels in pieces_of(batch, row):
                read[tokens, labels] += 1
                filler -= len(tokens) if set(tokens) != {EOS} else 0
    for piece in [piece for piece in read if set(piece[0]) == {EOS}]:  # filler, or an empty sample
        assert set(piece[1]) == {IGNORED_LABEL}
        del read[piece]
    expected = Counter(expected_piece(document) for document in documents.values())
    assert read == Counter({piece: 2 * count for piece, count in expected.items()})
    counts = [sum(values) for values in zip(*(batch.counts for batch in batches), strict=True)]
    assert counts == [2 * len(documents), 0, filler], "pieces, cut ones, padding"


def rows(loader_steps: list[list[Batch]]) -> dict[int, list[list[int]]]:
    return {
        sample: [tensor[row].tolist() for tensor in batch[:4]]
        for step in loader_steps
        for batch in step
        for row, sample in enumerate(batch.samples.tolist())
    }


def test_a_resume_on_other_ranks_and_workers_reads_the_same(manifest: str) -> None:
    """The order is that of a corpus of as many tokens, so it holds for any lanes too."""
    for lanes in (1, 5):
        data = config(manifest, lanes=lanes)
        straight = make_loader(data, total_steps=9)
        reference = rows(list(straight.steps(1)))
        state = OrderState.from_dict(json.loads(json.dumps(straight.state_at(4).to_dict())))
        for world_size, workers in ((1, 1), (2, 0), (3, 0), (6, 0)):
            found: dict[int, list[list[int]]] = {}
            for rank in range(world_size):
                resumed = make_loader(
                    replace(data, loader_workers=workers),
                    state=state,
                    total_steps=9,
                    rank=rank,
                    world_size=world_size,
                )
                found |= rows(list(resumed.steps(5)))
            assert found == {sample: row for sample, row in reference.items() if sample >= 4 * 12}


def test_whole_documents_mix_with_text_that_is_cut(manifest: str, tmp_path: Path) -> None:
    """The longer sequences of a stage join packed ones; what is cut is only the text."""
    text = Text(tmp_path / "text", 20 * CHUNK, seed=1)
    talks = SourceConfig(name="talks", manifest=manifest, weight=1)
    data = data_config([text], packing=Packing.best_fit)
    stages = [StageConfig(start_tokens=LENGTH * 24, sequence_length=2 * LENGTH, global_batch_sequences=6)]
    data = replace(data, sources=[*data.sources, talks], stages=stages, lanes=3)
    loader = make_loader(data, total_steps=10)
    expected = {expected_piece(document) for document in whole_documents(SIZES).values()}
    n_whole = 0
    for number, batches in enumerate(loader.steps(1), start=1):
        for batch in batches:
            where = loader.order.locate(batch.samples)
            source = where.source[np.unique(where.request, return_index=True)[1]]
            assert batch.tokens.shape[1] == (LENGTH if number <= 2 else 2 * LENGTH)
            for row in np.flatnonzero(source == 1).tolist():
                found = [piece for piece in pieces_of(batch, row) if set(piece[0]) != {EOS}]
                assert set(found) <= expected
                n_whole += len(found)
    assert n_whole > 50


def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(replace(SMALL, vocab_size=320), seed=0)


@pytest.mark.parametrize("times", [1, 4])
def test_the_loss_is_that_of_each_dialogue_in_a_sequence_of_its_own(
    documents: dict[str, Whole], manifest: str, times: int
) -> None:
    """The sums and the gradients; and what stands in filler changes no bit of them."""
    corpus, model = Corpus(manifest), decoder()
    per_chunk = 4 // times
    where = np.divmod(np.arange(3 * per_chunk), per_chunk)
    batch = build_batch(corpus, *where, times * LENGTH, document_masking=True)
    assert batch.counts.padding > 0

    def together(tokens: torch.Tensor) -> tuple[float, int, list[torch.Tensor]]:
        sums = model(tokens, batch.labels, positions=batch.positions, document_ids=batch.document_ids)
        gradients = torch.autograd.grad(sums.nll_sum, list(model.parameters()))
        return sums.nll_sum.item(), int(sums.n_predicted), list(gradients)

    nll, n_predicted, gradients = together(batch.tokens)
    in_batch = [piece for row in range(len(batch.tokens)) for piece in pieces_of(batch, row)]
    alone, n_alone = torch.zeros(()), 0
    for tokens, labels in (piece for piece in in_batch if set(piece[0]) != {EOS}):
        sums = model(torch.tensor([tokens]), torch.tensor([labels]))
        alone, n_alone = alone + sums.nll_sum, n_alone + int(sums.n_predicted)
    assert n_predicted == n_alone > 0
    assert nll == pytest.approx(alone.item(), rel=1e-6)
    for ours, theirs in zip(gradients, torch.autograd.grad(alone, list(model.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    is_filler = torch.zeros_like(batch.tokens, dtype=torch.bool)
    for row, ids in enumerate(batch.document_ids):
        last = ids == ids.max()
        is_filler[row] = last if set(batch.tokens[row][last].tolist()) == {EOS} else False
    assert int(is_filler.sum()) == batch.counts.padding
    other_nll, _, others = together(batch.tokens.masked_fill(is_filler, 7))
    assert other_nll == nll
    names = [name for name, _ in model.named_parameters()]
    for name, ours, theirs in zip(names, gradients, others, strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(("document_masking", "times"), [(True, 1), (False, 1), (False, 4)])
def test_filler_is_last_and_no_label(
    documents: dict[str, Whole], document_masking: bool, times: int, tmp_path: Path
) -> None:
    """Also without a loss mask, and where dialogues see each other: then filler is where nothing sees it."""
    corpus = Corpus(write_whole(tmp_path, documents, loss_mask=False))
    chunk, sequence = np.divmod(np.arange(4), 4 // times)
    batch = build_batch(corpus, chunk, sequence, times * LENGTH, document_masking)
    for row, (one, number) in enumerate(zip(chunk.tolist(), sequence.tolist(), strict=True)):
        pieces = corpus.documents(one)
        names = [
            name
            for name, start in zip(pieces.ids, pieces.starts.tolist(), strict=True)
            if start // (times * LENGTH) == number
        ]
        text = [token for name in names for token in documents[name].tokens]
        assert batch.tokens[row].tolist() == text + [EOS] * (times * LENGTH - len(text))
        first = set(np.cumsum([len(documents[name].tokens) for name in names]).tolist())
        new_run = {at for at in first if document_masking or at == len(text)}
        labels = batch.labels[row].tolist()
        expected = [IGNORED_LABEL if at + 1 in new_run else text[at + 1] for at in range(len(text))]
        if times == 1:
            assert labels[: len(text)] == expected
        assert set(labels[len(text) - 1 :]) == {IGNORED_LABEL}


@pytest.mark.parametrize("document_masking", [True, False])
def test_filler_is_never_hidden_by_masked_language_modeling(manifest: str, document_masking: bool) -> None:
    """And it is apart from the text, which sees what follows."""
    corpus = Corpus(manifest)
    masking = Masking(MlmConfig(fraction=0.9), seed=0, mask_id=4, ordinary_ids=np.arange(2, 300))
    chunk, sequence = np.divmod(np.arange(160), 4)
    batch = build_batch(corpus, chunk, sequence, LENGTH, document_masking, masking)
    n_hidden = n_filler = 0
    for row, (one, number) in enumerate(zip(chunk.tolist(), sequence.tolist(), strict=True)):
        ends = corpus.documents(one).ends
        end = int(ends[ends <= (number + 1) * LENGTH].max()) - number * LENGTH
        n_hidden += int((batch.labels[row, :end] != IGNORED_LABEL).sum())
        n_filler += LENGTH - end
        assert (batch.labels[row, end:] == IGNORED_LABEL).all() and (batch.tokens[row, end:] == EOS).all()
        assert end == LENGTH or int(batch.document_ids[row, end]) == int(batch.document_ids[row, end - 1]) + 1
    assert n_hidden > 50 and n_filler > 5


@settings(max_examples=8)
@given(seed=st.integers(0, 9), packing=st.sampled_from(Packing))
def test_documents_and_steps_are_found_both_ways(
    documents: dict[str, Whole], manifest: str, seed: int, packing: Packing
) -> None:
    """No piece of a step is filler, and each document of an epoch is found in the step that read it."""
    stages = [StageConfig(start_tokens=LENGTH * 48, sequence_length=2 * LENGTH, global_batch_sequences=6)]
    data = config(manifest, lanes=4, stages=stages, packing=packing)
    loader = make_loader(data, seed=seed, total_steps=None, total_epochs=1)
    history = ReadHistory(data, loader.state_at(loader.n_steps), step=loader.n_steps, world_size=1)
    found: dict[str, int] = {}
    for number, batches in enumerate(loader.steps(1), start=1):
        by_sample = rows([batches])
        for sequence in history.read_in(number):
            tokens = by_sample[sequence.sample][0]
            for piece in sequence.pieces:
                assert piece.first_token == 0
                assert tokens[: piece.n_tokens] == documents[piece.document].tokens
                assert piece.source == documents[piece.document].source
                tokens = tokens[piece.n_tokens :]
                found[piece.document] = number
            assert set(tokens) <= {EOS}
    assert found.keys() == documents.keys()
    for name in list(documents)[:20]:
        (read,) = history.reads_of(name)
        assert (read.step, read.piece.n_tokens) == (found[name], len(documents[name].tokens))


@pytest.mark.parametrize("length", [LENGTH // 2, LENGTH // 4])
def test_a_sequence_length_that_would_cut_is_refused(manifest: str, length: int) -> None:
    with pytest.raises(ConfigError, match=rf"data\.sequence_length={length} .*sequences of {LENGTH} tokens"):
        make_loader(config(manifest, sequence_length=length))
