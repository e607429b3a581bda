"""Adapters in the decoder: which matrices get one, what they add, and what merging them gives."""

from __future__ import annotations

from dataclasses import replace

import peft
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.arithmetic import adapter_parameters, flops_per_token
from pretrain.config import LoraConfig, ModelConfig
from pretrain.config.objective import TARGETS
from pretrain.errors import ConfigError, RunError
from pretrain.model.decoder import Decoder, Linear, build_decoder
from pretrain.model.lora import adapter_shapes, add_adapters, is_adapter, merged, n_adapters, plain_name
from support.adapted import adapted_decoder

MODEL = ModelConfig(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, vocab_size=64)
KINDS = {
    "plain": LoraConfig(r=4),
    "dora": LoraConfig(r=4, dora=True),
    "rank_stabilized": LoraConfig(r=4, alpha=3, rank_stabilized=True),
    "few": LoraConfig(r=2, targets=["v", "down"], dropout=0.3),
}
TOKENS = torch.arange(20).view(2, 10)


def base_weights(model: ModelConfig = MODEL) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in Decoder(model, seed=1).named_parameters()}


def trained_adapters(lora: LoraConfig, model: ModelConfig = MODEL) -> dict[str, torch.Tensor]:
    """Adapters as training would leave them: no factor is 0."""
    decoder = Decoder(model, seed=1)
    add_adapters(decoder, lora, seed=2)
    found = {plain_name(n): p.detach().clone() for n, p in decoder.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(3)
    return {n: w + 0.1 * torch.randn(w.shape, generator=generator) for n, w in found.items()}


def test_the_targets_are_the_matrices_of_a_block() -> None:
    block = Decoder(MODEL, seed=0).blocks[0]
    found = [name.rpartition(".")[2] for name, module in block.named_modules() if isinstance(module, Linear)]
    assert found == list(TARGETS)


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_are_trained_and_counted(kind: str) -> None:
    lora, decoder = KINDS[kind], Decoder(MODEL, seed=1)
    before = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    add_adapters(decoder, lora, seed=2)
    named = {plain_name(name): p for name, p in decoder.named_parameters()}
    trained = {name for name, p in named.items() if p.requires_grad}
    assert trained == {name for name in named if is_adapter(name)}
    assert {name: named[name].shape for name in before} == {name: p.shape for name, p in before.items()}
    assert n_adapters(list(trained)) == 2 * len(lora.targets)
    assert sum(named[name].numel() for name in trained) == adapter_parameters(MODEL, lora)
    assert {name: tuple(named[name].shape) for name in trained} == adapter_shapes(MODEL, lora)


@pytest.mark.parametrize("kind", KINDS)
def test_new_adapters_change_nothing_and_are_a_function_of_the_seed(kind: str) -> None:
    lora, models = KINDS[kind], [Decoder(MODEL, seed=1) for _ in range(3)]
    before = models[0].eval().logits(TOKENS)
    state = torch.random.get_rng_state()
    for model, seed in zip(models, (2, 2, 3), strict=True):
        add_adapters(model, lora, seed)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(models[0].eval().logits(TOKENS), before)
    one, same, other = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_merged_weights_compute_what_the_adapters_do(kind: str, tied: bool) -> None:
    """They differ by the order of sums only: x W + s (x A) B against x (W + s A B). Seen: 4e-7 of logits up to 1."""
    lora, model = KINDS[kind], replace(MODEL, tie_embeddings=tied)
    adapters = trained_adapters(lora, model)
    apart = adapted_decoder(model, lora, base_weights(model), adapters).logits(TOKENS).detach()
    base = base_weights(model)
    weights = merged(model, lora, base, adapters)
    assert all(torch.equal(weights[name], weights[name]) for name in weights)  # the base is left as it is
    together = build_decoder(model, weights, "cpu", torch.float32).logits(TOKENS)
    alone = build_decoder(model, base_weights(model), "cpu", torch.float32).logits(TOKENS)
    largest = float(apart.abs().max())
    assert float((together - apart).abs().max()) < 1e-5 * max(1.0, largest)
    assert float((alone - apart).abs().max()) > 1e-2 * largest  # the adapters do something
    changed = {name for name in weights if not torch.equal(weights[name], base_weights(model)[name])}
    assert len(changed) == 2 * len(lora.targets)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_follow_the_formulas(kind: str) -> None:
    """W + s B A of the papers, with the rows brought to the trained lengths for DoRA."""
    lora, adapters, base = KINDS[kind], trained_adapters(KINDS[kind]), base_weights()
    scale = {"plain": 16 / 4, "dora": 16 / 4, "rank_stabilized": 3 / 2, "few": 16 / 2}[kind]
    found = merged(MODEL, lora, base_weights(), adapters)
    for name in ("blocks.0.attention.v", "blocks.1.feed_forward.down"):
        a, b = adapters[f"{name}.lora_A.weight"], adapters[f"{name}.lora_B.weight"]
        expected = base[f"{name}.weight"] + scale * b @ a
        if lora.dora:
            lengths = adapters[f"{name}.lora_magnitude_vector.weight"]
            expected = expected * (lengths / expected.norm(dim=1))[:, None]
        torch.testing.assert_close(found[f"{name}.weight"], expected)


def test_adapters_of_another_configuration_are_refused() -> None:
    with pytest.raises(ConfigError, match="not those that its configuration describes"):
        merged(MODEL, LoraConfig(r=8), base_weights(), trained_adapters(KINDS["plain"]))


def test_an_adapter_that_is_not_made_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real, blocks = peft.inject_adapter_in_model, []

    def skip_the_second(config: object, block: torch.nn.Module) -> None:
        blocks.append(block)
        if len(blocks) == 1:
            real(config, block)

    monkeypatch.setattr(peft, "inject_adapter_in_model", skip_the_second)
    with pytest.raises(RunError, match="7 adapters were made of 14"):
        add_adapters(Decoder(MODEL, seed=1), KINDS["plain"], seed=2)


def test_operations_are_those_that_torch_counts() -> None:
    lora, length = LoraConfig(r=4), 16
    decoder = Decoder(MODEL, seed=1)
    add_adapters(decoder, lora, seed=2)
    tokens = torch.arange(length)[None]
    with FlopCounterMode(display=False) as counter:
        decoder(tokens, tokens).nll_sum.backward()
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op)}
    attention = 12.0 * MODEL.n_layers * MODEL.n_heads * MODEL.head_width * length
    assert sum(counted.values()) / length == flops_per_token(MODEL, length, lora) - attention
    assert flops_per_token(MODEL, length, lora) < flops_per_token(MODEL, length)
    assert flops_per_token(MODEL, length, LoraConfig()) == flops_per_token(MODEL, length)
