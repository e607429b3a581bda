"""The decoder against independent computations: plain loss, one document at a time, no cache, counted FLOPs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pretrain.arithmetic import count_parameters, flops_per_token, non_embedding_parameters
from pretrain.config import ModelConfig
from pretrain.model.decoder import (
    IGNORED_LABEL,
    Decoder,
    KVCache,
    build_decoder,
)

torch.set_num_threads(1)  # for tensors this small more threads gain nothing, and lose much on a busy machine

SMALL = ModelConfig(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, vocab_size=96)
SHAPES = {
    "grouped": SMALL,
    "multi_head": replace(SMALL, n_kv_heads=None),
    "one_kv_head": replace(SMALL, n_kv_heads=1),
    "wide_heads": replace(SMALL, d_head=20),
    "qk_norm": replace(SMALL, qk_norm=True),
    "tied": replace(SMALL, tie_embeddings=True),
    "biases": replace(SMALL, attention_bias=True),
    "all": replace(SMALL, n_layers=3, d_head=10, qk_norm=True, tie_embeddings=True),
}
shapes = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)


def batch(
    n_rows: int = 2, length: int = 24, vocab_size: int = 96, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.randint(0, vocab_size, (n_rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return drawn[:, :-1], drawn[:, 1:].clone()


def gradients(model: Decoder, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def test_initial_weights_depend_on_config_and_seed_only() -> None:
    torch.manual_seed(1)
    first = Decoder(SMALL, seed=7).state_dict()
    torch.manual_seed(2)
    torch.rand(3)
    again, other = Decoder(SMALL, seed=7).state_dict(), Decoder(SMALL, seed=8).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])
    torch.set_default_dtype(torch.bfloat16)
    try:
        rounded = Decoder(SMALL, seed=7).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(first[name].bfloat16(), rounded[name]) for name in first)


def test_initial_weights_have_the_stated_spread() -> None:
    config = ModelConfig(n_layers=8, d_model=128, n_heads=4, d_ff=256, vocab_size=512, init_std=0.03)
    for name, weight in Decoder(config, seed=3).named_parameters():
        if name.endswith("norm.weight"):
            assert (weight == 1).all()
            continue
        residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
        expected = 0.03 / math.sqrt(16) if residual else 0.03
        assert weight.std().item() == pytest.approx(expected, rel=0.05), name
        assert abs(weight.mean().item()) < 0.05 * expected, name


def test_initial_loss_is_that_of_a_uniform_guess() -> None:
    tokens, labels = batch()
    sums = Decoder(SMALL, seed=0)(tokens, labels)
    assert sums.n_predicted == labels.numel()
    assert sums.nll_sum.item() / labels.numel() == pytest.approx(math.log(96), abs=0.1)


@shapes
def test_parameter_counts(config: ModelConfig) -> None:
    model = Decoder(config, seed=0)
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())
    inner = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(("embed", "head")))
    assert non_embedding_parameters(config) == inner


@shapes
def test_flops_per_token(config: ModelConfig) -> None:
    """Exact when attention runs as plain matrix products, which is what the closed form counts.

    Fused kernels recompute the scores in their backward pass and skip masked tiles: both are left out by
    definition. The last layer's work for positions without a label is counted too, as it is done.
    """
    model = Decoder(config, seed=0)
    tokens, labels = batch(n_rows=3, length=16)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, labels).nll_sum.backward()
    assert counter.get_total_flops() == flops_per_token(config, 16) * tokens.numel()


@shapes
def test_loss_sums_are_those_of_the_logits(config: ModelConfig) -> None:
    model = Decoder(config, seed=0)
    tokens, labels = batch()
    labels[0, :5] = IGNORED_LABEL
    log_z = model.logits(tokens).double().logsumexp(-1)
    label_logits = model.logits(tokens).double().gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    predicted = labels != IGNORED_LABEL
    sums = model(tokens, labels)
    assert sums.nll_sum.item() == pytest.approx((log_z - label_logits)[predicted].sum().item(), rel=1e-6)
    assert sums.z_sum.item() == pytest.approx(log_z[predicted].square().sum().item(), rel=1e-6)
    assert sums.n_predicted.item() == labels.numel() - 5
    assert sums.nll_sum.dtype == sums.z_sum.dtype == torch.float32


def test_a_batch_without_labels_has_zero_sums_and_zero_gradients() -> None:
    model = Decoder(replace(SMALL, z_loss=0.1), seed=0)
    tokens, labels = batch()
    sums = model(tokens, torch.full_like(labels, IGNORED_LABEL))
    assert (sums.nll_sum.item(), sums.z_sum.item(), sums.n_predicted.item()) == (0, 0, 0)
    assert all((g == 0).all() for g in gradients(model, sums.nll_sum + sums.z_sum).values())


@pytest.mark.parametrize("chunk_tokens", [1, 7, 16, 47])
def test_chunked_loss_equals_the_whole(chunk_tokens: int) -> None:
    tokens, labels = batch()
    labels[1, 3:9] = IGNORED_LABEL
    whole = Decoder(replace(SMALL, z_loss=0.01), seed=0)
    chunked = Decoder(replace(SMALL, z_loss=0.01, loss_chunk_tokens=chunk_tokens), seed=0)
    a, b = whole(tokens, labels), chunked(tokens, labels)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(
        gradients(whole, a.nll_sum + 0.01 * a.z_sum), gradients(chunked, b.nll_sum + 0.01 * b.z_sum)
    )


def test_z_sum_has_a_gradient_only_if_it_has_a_weight() -> None:
    tokens, labels = batch()
    assert not Decoder(SMALL, seed=0)(tokens, labels).z_sum.requires_grad
    model = Decoder(replace(SMALL, z_loss=1e-4), seed=0)
    found = gradients(model, model(tokens, labels).z_sum)
    expected = gradients(model, model.logits(tokens).logsumexp(-1).square().sum())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.n_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [t.nbytes for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.n_bytes = max([self.n_bytes, *sizes])
        return out


def test_full_logits_are_never_held() -> None:
    config = ModelConfig(
        n_layers=1, d_model=16, n_heads=2, d_ff=16, vocab_size=1024, loss_chunk_tokens=64, z_loss=1e-4
    )
    tokens, labels = batch(n_rows=2, length=512, vocab_size=1024)
    saved: dict[int, int] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def measure(config: ModelConfig) -> tuple[int, int]:
        model = Decoder(config, seed=0)
        saved.clear()
        with LargestTensor() as largest:
            with saved_tensors_hooks(record, lambda tensor: tensor):
                sums = model(tokens, labels)
            (sums.nll_sum + sums.z_sum).backward()
        return largest.n_bytes, sum(saved.values())

    full_bytes, chunk_bytes = 1024 * 1024 * 4, 64 * 1024 * 4
    largest, held = measure(config)
    assert largest <= chunk_bytes
    assert held < full_bytes / 2
    largest, held = measure(replace(config, loss_chunk_tokens=1024))  # the measurement sees what it should
    assert largest >= full_bytes
    assert held > full_bytes


def test_no_view_of_a_weight_is_kept() -> None:
    """ZeRO-3 lets go of a gathered weight by giving the parameter other storage: what autograd keeps must be the
    parameter itself, for any view would hold the storage until the backward pass."""
    model = Decoder(SMALL, seed=0)
    owners = {p.untyped_storage().data_ptr(): p for p in model.parameters()}
    kept: list[bool] = []

    def record(tensor: torch.Tensor) -> torch.Tensor:
        owner = owners.get(tensor.untyped_storage().data_ptr())
        if owner is not None:
            kept.append(tensor is owner)
        return tensor

    with saved_tensors_hooks(record, lambda tensor: tensor):
        model(*batch())
    assert len(kept) >= 7 * SMALL.n_layers + 1  # the matrices of the blocks, and the head
    assert all(kept)


@shapes
def test_documents_do_not_see_each_other(config: ModelConfig) -> None:
    model = Decoder(config, seed=0).double()
    tokens, _ = batch(n_rows=2, length=24)
    lengths = [[5, 1, 18], [11, 13, 0]]
    ids = torch.stack([torch.repeat_interleave(torch.tensor([4, 9, 2]), torch.tensor(n)) for n in lengths])
    positions = torch.stack([torch.cat([torch.arange(k) for k in n]) for n in lengths])
    together = model.logits(tokens, positions, ids)
    for row, row_lengths in enumerate(lengths):
        start = 0
        for length in filter(None, row_lengths):
            alone = model.logits(tokens[row : row + 1, start : start + length])
            # Rotary tables are fp32 by design: 1e-6 of them remains visible in a double model.
            torch.testing.assert_close(
                together[row : row + 1, start : start + length], alone, rtol=0, atol=1e-6
            )
            start += length


@shapes
def test_a_token_does_not_see_later_ones(config: ModelConfig) -> None:
    model = Decoder(config, seed=0)
    tokens, _ = batch()
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 96
    before, after = model.logits(tokens), model.logits(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10], rtol=0, atol=1e-6)
    assert (before[:, 10:] - after[:, 10:]).abs().amax(-1).min() > 1e-4


def test_only_relative_positions_matter() -> None:
    model = Decoder(SMALL, seed=0)
    tokens, _ = batch()
    moved = model.logits(tokens, positions=torch.arange(100, 124).expand(2, -1))
    torch.testing.assert_close(model.logits(tokens), moved, rtol=0, atol=2e-6)
    stretched = model.logits(tokens, positions=torch.arange(0, 48, 2).expand(2, -1))
    assert (model.logits(tokens) - stretched).abs().max() > 1e-4


@shapes
def test_cached_steps_equal_the_whole_sequence(config: ModelConfig) -> None:
    """Rows of different lengths, padded on the right, then one token at a time."""
    model = Decoder(config, seed=0).eval()
    tokens, _ = batch(n_rows=3, length=20)
    prompt_lengths = torch.tensor([9, 4, 1])
    cache = KVCache(config, 3, 20, "cpu", torch.float32)
    prompt = torch.arange(9) < prompt_lengths[:, None]
    positions = torch.arange(9).expand(3, -1)
    with torch.no_grad():
        whole = model.logits(tokens)
        prefill = model.logits(torch.where(prompt, tokens[:, :9], 95), positions, cache=cache)
        torch.testing.assert_close(prefill[prompt], whole[:, :9][prompt], rtol=0, atol=2e-6)
        rows = torch.arange(3)
        for step in range(11):
            at = prompt_lengths + step
            logits = model.logits(tokens[rows, at][:, None], at[:, None], cache=cache)
            torch.testing.assert_close(logits[:, 0], whole[rows, at], rtol=0, atol=2e-6)


def test_tied_weights_are_one_parameter() -> None:
    model = Decoder(SHAPES["tied"], seed=0)
    assert model.head.weight is model.embed.weight
    assert "head.weight" not in dict(model.named_parameters())
    assert Decoder(SMALL, seed=0).head.weight.shape == (96, 32)


@shapes
def test_build_decoder_gives_the_same_model(config: ModelConfig) -> None:
    model = Decoder(replace(config, dropout=0.5), seed=0).eval()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    built = build_decoder(replace(config, dropout=0.5), weights, "cpu", torch.float32)
    tokens, _ = batch()
    assert torch.equal(built.logits(tokens), model.logits(tokens))
    assert set(dict(built.named_parameters())) == set(weights)
    del weights["blocks.1.feed_forward.up.weight"]
    with pytest.raises(RuntimeError, match=r"feed_forward\.up"):
        build_decoder(config, weights, "cpu", torch.float32)


def test_bf16_stays_near_fp32() -> None:
    model = Decoder(replace(SMALL, qk_norm=True), seed=0)
    tokens, labels = batch()
    with torch.no_grad():
        exact = model(tokens, labels)
        rounded = model.bfloat16()(tokens, labels)
    assert rounded.nll_sum.dtype == torch.float32
    assert rounded.nll_sum.item() == pytest.approx(exact.nll_sum.item(), rel=2e-3)


def test_dropout_acts_on_both_branches_in_training_only() -> None:
    tokens, _ = batch()
    model = Decoder(replace(SMALL, n_layers=1, dropout=0.5), seed=0)
    assert torch.equal(model.eval().logits(tokens), model.logits(tokens))
    assert not torch.equal(model.train().logits(tokens), model.logits(tokens))
    x = torch.zeros(1, 2000, 32)
    cos = sin = torch.zeros(1, 1, 2000, 8)
    block = model.blocks[0]
    for branch in (block.attention, block.feed_forward):  # a constant branch shows the mask and its scale
        branch.forward = lambda x, *rest: torch.ones_like(x)  # type: ignore[method-assign]
    values, counts = block(x, cos, sin, None, None).unique(return_counts=True)
    assert values.tolist() == [0, 2, 4]
    torch.testing.assert_close(counts / counts.sum(), torch.tensor([0.25, 0.5, 0.25]), rtol=0, atol=0.02)


def test_it_learns() -> None:
    """A few steps on one repeated sequence bring its loss near 0: gradients reach what they should."""
    model = Decoder(replace(SMALL, qk_norm=True), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens, labels = batch(n_rows=1)
    for _ in range(60):
        loss = model(tokens, labels).nll_sum / labels.numel()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
        optimizer.step()
    assert loss.item() < 0.1
    greedy = model.logits(tokens).argmax(-1)
    assert torch.equal(greedy, labels)
    assert F.cross_entropy(model.logits(tokens)[0], labels[0]).item() < 0.1
