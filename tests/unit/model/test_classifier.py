"""The head of a classifier: plain PyTorch computes the same, however documents are batched and packed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pretrain.arithmetic import count_parameters, non_embedding_parameters
from pretrain.batch import IGNORED_LABEL
from pretrain.config import ModelConfig, Pooling
from pretrain.model.decoder import Decoder, LossSums
from pretrain.model.pooling import document_means

CLASSES = ["bad", "good", "so-so"]
MODEL = ModelConfig(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, vocab_size=64, classes=CLASSES)
poolings = pytest.mark.parametrize("pooling", list(Pooling))


def classifier(pooling: Pooling, **options: object) -> Decoder:
    model = Decoder(replace(MODEL, pooling=pooling, **options), seed=1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)  # so that classes differ
    return model


def documents() -> list[tuple[Tensor, int]]:
    """Documents (tokens with bos and eos) and their classes."""
    generator = torch.Generator().manual_seed(2)
    lengths = (5, 3, 9, 2, 7)
    return [
        (
            torch.cat(
                [torch.tensor([1]), torch.randint(5, 64, (n,), generator=generator), torch.tensor([2])]
            ),
            n % 3,
        )
        for n in lengths
    ]


def expected(model: Decoder, tokens: Tensor, label: int) -> Tensor:
    """The loss of one document, from the definition."""
    states = model.hidden(tokens[None])[0]
    pooled = states[-1] if model.config.pooling is Pooling.last else states.mean(0)
    return F.cross_entropy((model.head.weight @ pooled)[None], torch.tensor([label]))


def packed() -> tuple[Tensor, ...]:
    """All documents in two rows, each followed by its label, as the loader gives them: (tokens, labels, positions,
    document ids), with padding that is a document of its own."""
    rows = [documents()[:3], documents()[3:]]
    length = max(sum(len(tokens) + 1 for tokens, _ in row) for row in rows)
    batch = torch.zeros(4, 2, length, dtype=torch.int64)
    batch[1] = IGNORED_LABEL
    for row, members in enumerate(rows):
        at = 0
        for number, (tokens, label) in enumerate(members):
            n = len(tokens)
            batch[0, row, at : at + n], batch[0, row, at + n] = tokens, label
            batch[1, row, at + n - 1] = label
            batch[2, row, at : at + n + 1] = torch.arange(n + 1)
            batch[3, row, at : at + n + 1] = number
            at += n + 1
        batch[2, row, at:], batch[3, row, at:] = torch.arange(length - at), len(members)
    return tuple(batch)


@poolings
def test_packed_documents_have_the_loss_and_gradient_of_each_alone(pooling: Pooling) -> None:
    model = classifier(pooling)
    sums = model(*packed())
    assert int(sums.n_predicted) == len(documents())
    sums.nll_sum.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = torch.stack([expected(model, tokens, label) for tokens, label in documents()]).sum()
    total.backward()
    torch.testing.assert_close(sums.nll_sum, total)
    assert len(found) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert (found[name] - parameter.grad).norm() < 1e-5 * parameter.grad.norm(), name


@poolings
def test_no_document_sees_a_label(pooling: Pooling) -> None:
    """Not its own, nor that of another document."""
    model, (tokens, labels, *others) = classifier(pooling).eval(), packed()
    is_label = torch.zeros_like(tokens, dtype=torch.bool)
    is_label[:, 1:] = labels[:, :-1] != IGNORED_LABEL
    changed = torch.where(is_label, (tokens + 7) % 60, tokens)
    assert torch.equal(model(tokens, labels, *others).nll_sum, model(changed, labels, *others).nll_sum)


@poolings
def test_whole_documents_in_a_padded_batch_get_the_logits_of_each_alone(pooling: Pooling) -> None:
    model = classifier(pooling).eval()
    lengths = torch.tensor([len(tokens) for tokens, _ in documents()])
    batch = torch.nn.utils.rnn.pad_sequence([tokens for tokens, _ in documents()], batch_first=True)
    logits = model.class_logits(batch, lengths)
    assert (logits.shape, logits.dtype) == ((5, 3), torch.float32)
    for row, (tokens, label) in enumerate(documents()):
        alone = F.cross_entropy(logits[row][None], torch.tensor([label]))
        torch.testing.assert_close(alone, expected(model, tokens, label))


def test_the_confusion_matrix_counts_documents_only_in_evaluation() -> None:
    model = classifier(Pooling.last)
    assert model.train()(*packed()).confusion is None
    found: LossSums = model.eval()(*packed())
    counts = torch.zeros(3, 3, dtype=torch.int64)
    for tokens, label in documents():
        counts[label, model.class_logits(tokens[None], torch.tensor([len(tokens)]))[0].argmax()] += 1
    assert found.confusion is not None
    assert torch.equal(found.confusion, counts)
    assert 0 < int(counts.diagonal().sum()) < 5  # otherwise rows and columns could be swapped


@poolings
@pytest.mark.parametrize("tied", [False, True])
def test_only_the_head_differs_from_a_language_model(pooling: Pooling, tied: bool) -> None:
    shape = replace(MODEL, tie_embeddings=tied, pooling=pooling)
    ours, theirs = Decoder(shape, seed=3), Decoder(replace(shape, classes=[], pooling=Pooling.last), seed=3)
    others = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        assert name == "head.weight" or torch.equal(weight, others[name]), name
    assert ours.head.weight.shape == (3, 32)
    assert sum(p.numel() for p in ours.parameters()) == count_parameters(shape)
    assert non_embedding_parameters(shape) == non_embedding_parameters(theirs.config)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=5), st.integers(0, 999))
def test_document_means(extents: list[tuple[int, int]], seed: int) -> None:
    """Documents of some tokens, each followed by others that do not count."""
    states = torch.randn(
        1, sum(n + more for n, more in extents), 4, generator=torch.Generator().manual_seed(seed)
    )
    positions = torch.cat([torch.arange(n + more) for n, more in extents])[None]
    is_last = torch.zeros_like(positions, dtype=torch.bool)
    at, expected_means = 0, []
    for n, more in extents:
        is_last[0, at + n - 1] = True
        expected_means.append(states[0, at : at + n].mean(0))
        at += n + more
    found = document_means(states, positions, is_last)
    torch.testing.assert_close(found[is_last], torch.stack(expected_means))
