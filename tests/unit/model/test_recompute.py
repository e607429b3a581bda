"""Activation checkpointing: the same numbers bit by bit, less memory, under ZeRO-3 and torch.compile."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.config import AttentionKernel, LoraConfig, ModelConfig, Recompute
from pretrain.model.decoder import Block, Decoder
from pretrain.model.kernels import PLAIN
from pretrain.model.lora import add_adapters
from pretrain.model.rotary import rotary_tables
from pretrain.plan.memory import saved_bytes_per_token, selected_bytes_per_token
from support.launching import run_ranks

torch.set_num_threads(1)

SMALL = ModelConfig(n_layers=3, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, vocab_size=96, dropout=0.2)
TOKENS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))


def losses_and_gradients(model: Decoder, longest: int = 7) -> list[torch.Tensor]:
    """With documents of so many tokens."""
    torch.manual_seed(5)  # dropout
    documents = torch.arange(24).expand(2, -1) // longest
    loss = model(TOKENS, TOKENS.roll(-1, 1), document_ids=documents).nll_sum
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("kernel", [AttentionKernel.sdpa, AttentionKernel.flash])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [Recompute.selective, Recompute.full])
def test_it_changes_no_bit(mode: Recompute, dtype: torch.dtype, kernel: AttentionKernel) -> None:
    kernels = replace(PLAIN, attention=kernel)
    plain = Decoder(SMALL, 0, kernels).to(dtype)
    again = Decoder(replace(SMALL, activation_checkpointing=mode), 0, kernels).to(dtype)
    for a, b in zip(losses_and_gradients(plain), losses_and_gradients(again), strict=True):
        assert torch.equal(a, b)


class Held(TorchDispatchMode):
    """Which of the tensors that operations make are still held by someone."""

    def __init__(self, given: list[torch.Tensor]) -> None:
        """`given`: tensors that were there before."""
        super().__init__()
        self.given = {tensor.untyped_storage()._cdata for tensor in given}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func is torch.ops.aten.mm.default
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.given:
                    self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    @property
    def n_bytes(self) -> int:
        gc.collect()
        return sum(size for storage, size in self.made.values() if not storage.expired())


@pytest.mark.parametrize("n_kv_heads", [8, 2])
def test_what_is_kept_is_what_the_planner_says(n_kv_heads: int) -> None:
    """Of a bf16 block; its input is held by its caller."""
    shape = ModelConfig(n_layers=1, d_model=256, n_heads=8, n_kv_heads=n_kv_heads, d_ff=704, vocab_size=512)
    tokens, length = 2 * 64, 64
    kept, products = {}, {}
    for mode in Recompute:
        config = replace(shape, activation_checkpointing=mode)
        block = Block(config, 0, torch.Generator().manual_seed(0)).bfloat16()
        x = torch.randn(2, length, config.d_model, dtype=torch.bfloat16, requires_grad=True)
        cos, sin = rotary_tables(torch.arange(length).expand(2, length), config)
        with Held([x, cos, sin, *block.parameters()]) as held:
            y = block(x, cos, sin, None, None)
            kept[mode] = held.n_bytes - y.nbytes
            held.products = 0
            y.sum().backward()
            products[mode] = held.products
    assert kept[Recompute.full] == 0
    assert kept[Recompute.selective] == tokens * (selected_bytes_per_token(shape, 2) - 2 * shape.d_model)
    # The CPU has no fused norms: they keep 12 D bytes more per token, as in test_planner.py.
    norms = 12 * shape.d_model
    formula = saved_bytes_per_token(shape, 2, length, masked=False)
    assert kept[Recompute.none] == tokens * (formula + norms)
    # A product has two of its kind as its gradient; 7 are computed again.
    assert products == {Recompute.none: 14, Recompute.selective: 14, Recompute.full: 14 + 7}


def test_selective_mode_keeps_the_products_of_adapters_too() -> None:
    lora, length = LoraConfig(r=4, targets=["k", "output", "up"]), 64
    config = ModelConfig(n_layers=1, d_model=256, n_heads=8, n_kv_heads=2, d_ff=704, vocab_size=512)
    config = replace(config, activation_checkpointing=Recompute.selective)
    decoder = Decoder(config, seed=0).bfloat16()
    add_adapters(decoder, lora, seed=1)
    block = decoder.blocks[0]
    x = torch.randn(2, length, config.d_model, dtype=torch.bfloat16, requires_grad=True)
    cos, sin = rotary_tables(torch.arange(length).expand(2, length), config)
    with Held([x, cos, sin, *block.parameters()]) as held:
        y = block(x, cos, sin, None, None)
        kept = held.n_bytes - y.nbytes
    assert kept == 2 * length * (selected_bytes_per_token(config, 2, lora) - 2 * config.d_model)


@pytest.mark.parametrize(
    ("mode", "kernel"),
    [(mode, AttentionKernel.flash) for mode in Recompute] + [(Recompute.selective, AttentionKernel.sdpa)],
)
def test_a_compiled_block_includes_it(
    mode: Recompute, kernel: AttentionKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph for all blocks and one for the loss, whatever is computed again and however many documents there are.
    Without code generation, which takes a minute and changes roundings."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    counters["stats"].clear()
    config = replace(SMALL, activation_checkpointing=mode, dropout=0.0)
    kernels = replace(PLAIN, attention=kernel)
    plain, compiled = Decoder(config, 0, kernels), Decoder(config, 0, kernels)
    compiled.compile_parts()
    for longest in (24, 7, 1):
        found = (losses_and_gradients(model, longest) for model in (plain, compiled))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.integration
def test_it_changes_no_bit_under_zero_3(tmp_path: Path) -> None:
    """Gathering that goes on while blocks are computed again differs from that of the forward pass: parameters are
    gathered ahead in part, and of some layers kept."""
    tight = [
        "engine.max_live_elements=20000",
        "engine.prefetch_bucket_elements=9000",
        "engine.persistence_threshold_elements=0",
        "model.n_layers=6",
        "model.dropout=0.1",
    ]
    jobs = [
        {
            "stage": 3,
            "precision": "bf16",
            "steps": 3,
            "overrides": [*tight, f"model.activation_checkpointing={mode.value}"],
            "out": str(tmp_path / mode.value),
        }
        for mode in Recompute
    ]
    run_ranks(2, "tests/support/workers/engine_worker.py", json.dumps(jobs), log_dir=tmp_path / "logs")
    plain, selective, full = (json.loads(Path(job["out"]).read_text()) for job in jobs)
    assert plain == selective == full
    assert plain["losses"][2] < plain["losses"][0]
