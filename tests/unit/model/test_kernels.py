"""8-bit products on the CPU, which has the same operator; Liger's kernels with a mock; and who may use them."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from pretrain.config import ModelConfig, Recompute, TrainConfig, load_config
from pretrain.errors import ConfigError
from pretrain.model import float8
from pretrain.model.decoder import Decoder, RMSNorm
from pretrain.model.kernels import PLAIN, Capability, resolve

torch.set_num_threads(1)

SMALL = ModelConfig(n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, d_ff=96, vocab_size=96)
TOKENS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
LABELS = TOKENS.roll(-1, 1).masked_fill(TOKENS == 3, -100)


def config_of(*overrides: str) -> TrainConfig:
    return load_config(TrainConfig, ["run_dir=r", "data.manifest=m", "total_steps=200", *overrides], "config")


# ---- 8 bits ----


def drawn(*shape: int, scale: float = 1.0) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    return (values * scale).bfloat16().requires_grad_()


def relative_errors(x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor) -> list[float]:
    """Of the product and of both gradients."""
    errors = []
    exact = [x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    y, expected = float8.product(x, weight), F.linear(*exact)
    found = [y, *torch.autograd.grad(y, (x, weight), dy)]
    truth = [expected, *torch.autograd.grad(expected, exact, dy.double())]
    for a, b in zip(found, truth, strict=True):
        assert a.dtype == torch.bfloat16 and a.shape == b.shape
        errors.append(((a - b).norm() / b.norm()).item())
    return errors


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_products_in_8_bits_are_near(scale: float) -> None:
    """e4m3 has 4 bits of mantissa, e5m2 3: a factor is off by up to 1/16 or 1/8 of itself, by a third or so of that as
    a root mean square: 0.037 for two factors of the former, 0.059 with a gradient. Scales make it so for any range."""
    x, weight = drawn(2, 24, 64, scale=scale), drawn(96, 64, scale=0.02)
    forward, *backward = relative_errors(x, weight, drawn(2, 24, 96, scale=1e-5).detach())
    assert 0.02 < forward < 0.045
    assert all(0.03 < error < 0.07 for error in backward)


def test_zeros_and_outliers_are_finite_and_nan_is_not() -> None:
    x = torch.zeros(16, 32, dtype=torch.bfloat16)
    weight = drawn(16, 32).detach()
    assert (float8.product(x, weight) == 0).all()
    x[0, 0] = 1e37
    assert float8.product(x, weight).isfinite().all()
    x[0, 0] = math.nan  # what is not finite shows, so that the step is left out
    assert float8.product(x, weight).isnan().all()


def test_the_weight_may_go_before_the_backward_pass() -> None:
    """As under ZeRO-3, which lets go of a gathered weight and brings it back."""
    x, weight = drawn(16, 32), torch.nn.Parameter(drawn(48, 32).detach())
    expected = torch.autograd.grad(float8.product(x, weight).sum(), weight)[0]
    y, storage, values = (
        float8.product(x, weight),
        StorageWeakRef(weight.untyped_storage()),
        weight.detach().clone(),
    )
    weight.data = torch.empty(0, dtype=torch.bfloat16)
    assert storage.expired()
    weight.data = values
    assert torch.equal(torch.autograd.grad(y.sum(), weight)[0], expected)


def test_a_model_learns_in_8_bits() -> None:
    losses = {}
    for fp8 in (False, True):
        model = Decoder(SMALL, 0, replace(PLAIN, fp8=fp8)).bfloat16()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        found = []
        for _ in range(30):
            loss = model(TOKENS[:, :16], LABELS[:, :16]).nll_sum / 32
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses[fp8] = found
    assert losses[True][0] != losses[False][0], "8 bits are at work"
    assert losses[True][0] == pytest.approx(losses[False][0], abs=0.05)
    assert losses[True][-1] < losses[True][0] / 2
    assert losses[True][-1] == pytest.approx(losses[False][-1], abs=0.3)


def test_8_bits_within_selective_checkpointing_and_a_compiled_block() -> None:
    kernels = replace(PLAIN, fp8=True)
    found = []
    for mode, compiled in (
        (Recompute.none, False),
        (Recompute.selective, False),
        (Recompute.selective, True),
    ):
        model = Decoder(replace(SMALL, activation_checkpointing=mode), 0, kernels).bfloat16()
        if compiled:
            for block in model.blocks:
                block.compile(fullgraph=True, backend="aot_eager")
        loss = model(TOKENS[:, :16], LABELS[:, :16]).nll_sum
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


# ---- Liger ----


@pytest.fixture
def mock_liger(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A mock of the package, by its documentation: which of its functions were called."""
    called: list[str] = []
    functional = ModuleType("liger_kernel.transformers.functional")

    def liger_rms_norm(
        X: torch.Tensor, W: torch.Tensor, eps: float, offset: float, casting_mode: str, in_place: bool
    ) -> torch.Tensor:
        assert (casting_mode, in_place) == ("gemma", False)
        called.append("norm")
        x = X.float()
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (W.float() + offset)).to(X.dtype)

    def liger_swiglu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        called.append("swiglu")
        return F.silu(a.float()).to(b.dtype) * b

    def liger_fused_linear_cross_entropy(
        input: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        bias: torch.Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        accum_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        assert input.ndim == 2 and target.ndim == 1 and accum_dtype is torch.float32
        called.append("loss")
        logits = (input @ weight.t()).float()
        return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)

    for function in (liger_rms_norm, liger_swiglu, liger_fused_linear_cross_entropy):
        setattr(functional, function.__name__, function)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    return called


@pytest.mark.parametrize("mode", Recompute)
@pytest.mark.parametrize("shape", [SMALL, replace(SMALL, qk_norm=True, tie_embeddings=True)])
def test_a_model_of_ligers_parts_is_the_same(
    mock_liger: list[str], shape: ModelConfig, mode: Recompute
) -> None:
    config = replace(shape, activation_checkpointing=mode)
    found = []
    for kernels in (PLAIN, replace(PLAIN, liger=True)):
        model = Decoder(config, 0, kernels)
        sums = model(TOKENS, LABELS)
        loss = 0.25 * sums.nll_sum / sums.n_predicted
        found.append([sums.nll_sum.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
        assert sums.nll_sum.dtype == torch.float32
        whole = model(TOKENS, LABELS).nll_sum.item()
        parts = [model(TOKENS[i : i + 1], LABELS[i : i + 1]).nll_sum.item() for i in range(2)]
        assert sum(parts) == pytest.approx(whole, rel=1e-6)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    norms = sum(isinstance(part, RMSNorm) for part in model.modules())
    del mock_liger[:]
    with torch.no_grad():
        model(TOKENS, LABELS)
    assert mock_liger.count("norm") == norms
    assert mock_liger.count("swiglu") == config.n_layers
    assert mock_liger.count("loss") == 1


# ---- who may use them ----

H100 = Capability("cuda", 90, triton=True, liger=True)


def test_they_are_for_gpus_that_can() -> None:
    assert resolve(config_of("kernels=fp8"), H100).kernels.fp8
    assert resolve(config_of("kernels=liger"), H100).kernels.liger
    refused = [
        ("fp8", Capability("cpu"), "8.9"),
        ("fp8", H100._replace(compute=86), "8.9"),
        ("liger", Capability("cpu"), "GPU"),
        ("liger", H100._replace(triton=False), "triton"),
        ("liger", H100._replace(liger=False), "liger-kernel"),
    ]
    for name, capability, word in refused:
        with pytest.raises(ConfigError, match=f"kernels.{name}=true.*{word}.*kernels.{name}=false"):
            resolve(config_of(f"kernels={name}"), capability)


# ---- compiling ----


@pytest.mark.parametrize(
    ("asked", "capability", "chosen"),
    [
        ("auto", H100, "always"),
        ("auto", Capability("cpu"), "never"),
        ("always", Capability("cpu"), "always"),
        ("never", H100, "never"),
    ],
)
def test_a_gpu_compiles_unless_told_otherwise(asked: str, capability: Capability, chosen: str) -> None:
    assert resolve(config_of(f"kernels.compile={asked}"), capability).kernels.compile.value == chosen


@torch._dynamo.config.patch(suppress_errors=False)  # compile_parts sets it; put back afterwards
def test_what_cannot_be_compiled_is_computed_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where compiling was chosen and not asked for, a device or an installation that cannot costs speed only."""

    def broken(*_: object) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    expected = Decoder(SMALL, 0)(TOKENS, LABELS).nll_sum
    for fall_back in (True, False):
        torch._dynamo.reset()
        model = Decoder(SMALL, 0)
        model.compile_parts(fall_back)
        if fall_back:
            assert torch.equal(model(TOKENS, LABELS).nll_sum, expected)
        else:
            with pytest.raises(Exception, match="no compiler here"):
                model(TOKENS, LABELS)
