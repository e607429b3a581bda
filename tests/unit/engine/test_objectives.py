"""The objective weighs every predicted token of a step alike, however the step is split."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pretrain.config import ModelConfig
from pretrain.engine.objectives import training_loss
from pretrain.model.decoder import IGNORED_LABEL, Decoder, LossSums


def test_formula() -> None:
    sums = LossSums(torch.tensor(6.0), torch.tensor(10.0), torch.tensor(2))
    assert training_loss(sums, 0.0, 4, 1.0).item() == 1.5
    assert training_loss(sums, 0.2, torch.tensor(4), 3.0).item() == pytest.approx(6.0)


def test_unevenly_filled_micro_batches_give_the_gradient_of_the_whole_batch() -> None:
    config = ModelConfig(n_layers=1, d_model=16, n_heads=2, d_ff=16, vocab_size=32, z_loss=1e-2)
    model = Decoder(config, seed=0)
    tokens = torch.randint(0, 32, (4, 12), generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1, dims=1)
    labels[0, 1:] = IGNORED_LABEL
    labels[2, :7] = IGNORED_LABEL
    n_predicted = int((labels != IGNORED_LABEL).sum())

    for start, stop in ((0, 1), (1, 2), (2, 4)):
        sums = model(tokens[start:stop], labels[start:stop])
        training_loss(sums, 1e-2, n_predicted, scale=1.0).backward()
    accumulated = {name: p.grad for name, p in model.named_parameters()}

    logits = model.logits(tokens).flatten(0, 1)
    log_z = logits.logsumexp(-1)[labels.flatten() != IGNORED_LABEL]
    mean = F.cross_entropy(logits, labels.flatten()) + 1e-2 * log_z.square().mean()
    parameters = dict(model.named_parameters())
    expected = dict(zip(parameters, torch.autograd.grad(mean, list(parameters.values())), strict=True))
    torch.testing.assert_close(accumulated, expected)
