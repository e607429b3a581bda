"""Each attention kernel against the others: documents as a mask, as blocks, as where they begin."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import AttentionKernel, ModelConfig, TrainConfig, load_config
from pretrain.errors import ConfigError
from pretrain.model import attention
from pretrain.model.attention import Documents, attend, visibility
from pretrain.model.decoder import Decoder
from pretrain.model.kernels import PLAIN, Capability, capability_of, resolve

torch.set_num_threads(1)

KERNELS = [AttentionKernel.sdpa, AttentionKernel.flash, AttentionKernel.flex]
CPU = Capability("cpu")
H100 = Capability("cuda", 90, triton=True)
T, K = 24, 16

# Lengths of the documents of a sequence, and their ids: neighbors differ.
SEQUENCES = st.lists(st.integers(1, 9), min_size=1, max_size=6).map(
    lambda lengths: torch.repeat_interleave(torch.arange(len(lengths)) % 3, torch.tensor(lengths))
)


def ids_of(*rows: list[int]) -> torch.Tensor:
    return torch.stack([torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in rows])


IDS = ids_of([24], [1, 22, 1], [5, 7, 4, 8])


def inputs(n_heads: int, n_groups: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v as a layer makes them: [B, heads, T, K], with the heads of a token side by side in memory."""
    drawn = torch.Generator().manual_seed(0)
    heads = (n_heads, n_groups, n_groups)
    return [
        torch.randn(len(IDS), T, n, K, generator=drawn).to(dtype).transpose(1, 2).requires_grad_()
        for n in heads
    ]


@settings(deadline=None)
@given(st.lists(SEQUENCES, min_size=1, max_size=3))
def test_starts_say_what_the_mask_says(rows: list[torch.Tensor]) -> None:
    length = min(len(row) for row in rows)
    ids = torch.stack([row[:length] for row in rows])
    documents = visibility(ids, AttentionKernel.flash)
    assert isinstance(documents, Documents)
    starts = documents.starts.tolist()
    assert (starts[0], starts[-1], documents.longest) == (0, ids.numel(), length)
    seen = torch.zeros(ids.numel(), ids.numel(), dtype=torch.bool)
    for start, stop in pairwise(starts):
        assert start < stop
        seen[start:stop, start:stop] = torch.ones(stop - start, stop - start).tril().bool()
    # An id may come again in a sequence, as here that of the first in the fourth: another document, not this one.
    unique = F.pad((ids[:, 1:] != ids[:, :-1]).cumsum(1), (1, 0))
    mask = visibility(unique, AttentionKernel.sdpa)
    assert isinstance(mask, torch.Tensor)
    assert torch.equal(seen, torch.block_diag(*mask[:, 0]).bool())


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
@pytest.mark.parametrize("n_groups", [4, 2, 1])
@pytest.mark.parametrize("kernel", KERNELS[1:])
def test_kernels_agree_in_fp32(kernel: AttentionKernel, n_groups: int, causal: bool) -> None:
    q, k, v = inputs(4, n_groups, torch.float32)
    expected = attend(q, k, v, visibility(IDS, AttentionKernel.sdpa, causal), causal)
    if kernel is AttentionKernel.flex:  # on a CPU it refuses what needs a gradient
        y = attend(q.detach(), k.detach(), v.detach(), visibility(IDS, kernel, causal), causal)
        torch.testing.assert_close(y, expected, rtol=0, atol=2e-6)
        return
    y = attend(q, k, v, visibility(IDS, kernel, causal), causal)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(y, (q, k, v), dy)
    # Sums of up to 24 terms of size 1 in another order: some units of the last of 24 bits. Seen: 1.6e-6.
    torch.testing.assert_close(y, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (q, k, v), dy), rtol=0, atol=5e-6)


def test_documents_in_bf16_are_as_near_to_the_truth_as_a_mask() -> None:
    exact = inputs(4, 2, torch.float32)
    dy = torch.randn(3, 4, T, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    exact = [x.detach().float().requires_grad_() for x in rounded]
    y = attend(*exact, visibility(IDS, AttentionKernel.sdpa))
    truth = [y, *torch.autograd.grad(y, exact, dy.float())]
    errors = []
    for kernel in (AttentionKernel.sdpa, AttentionKernel.flash):
        y = attend(*rounded, visibility(IDS, kernel))
        found = [y, *torch.autograd.grad(y, rounded, dy)]
        errors.append([(a - b).abs().max().item() for a, b in zip(found, truth, strict=True)])
    for mask, documents in zip(*errors, strict=True):
        assert documents < max(1.5 * mask, 2**-7)


@pytest.mark.parametrize("kernel", KERNELS)
def test_tokens_see_both_sides_of_their_document_and_no_other(kernel: AttentionKernel) -> None:
    """By definition: which outputs change when one value changes."""
    q, k, v = (x.detach() for x in inputs(4, 2, torch.float32))
    visible = visibility(IDS, kernel, causal=False)
    before = attend(q, k, v, visible, causal=False)
    for place in (0, 6, 23):
        changed = v.clone()
        changed[:, :, place] += 1
        sees = (attend(q, k, changed, visible, causal=False) != before).any(dim=3).all(dim=1)
        assert torch.equal(sees, IDS[:, place, None] == IDS)


def test_without_documents_a_sequence_is_one_document() -> None:
    q, k, v = inputs(4, 2, torch.float32)
    mask = torch.ones(1, 1, T, T, dtype=torch.bool)
    torch.testing.assert_close(attend(q, k, v, None, causal=False), attend(q, k, v, mask), rtol=0, atol=2e-6)


def test_without_documents_every_kernel_is_causal_attention() -> None:
    assert [visibility(None, kernel) for kernel in KERNELS] == [None] * 3
    q, k, v = inputs(4, 2, torch.float32)
    mask = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
    torch.testing.assert_close(attend(q, k, v, None), attend(q, k, v, mask), rtol=0, atol=2e-6)


def mock_varlen_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts_q: torch.Tensor,
    starts_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """A mock of torch.nn.attention.varlen.varlen_attn, which needs a GPU, by its documentation (torch 2.12)."""
    assert starts_q.dtype == starts_k.dtype == torch.int32
    before, after = window_size
    parts = []
    for (a, b), (c, d) in zip(pairwise(starts_q.tolist()), pairwise(starts_k.tolist()), strict=True):
        assert b - a <= longest_q and d - c <= longest_k
        distance = torch.arange(d - c) - torch.arange(b - a)[:, None]
        mask = ((before < 0) | (distance >= -before)) & ((after < 0) | (distance <= after))
        heads = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        y = F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=enable_gqa)
        parts.append(y[0].transpose(0, 1))
    return torch.cat(parts)


def mock_varlen_attn_2_11(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: object = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """The same with the parameters of torch 2.11."""
    assert query.shape[1] == key.shape[1] == value.shape[1], "it cannot group queries"
    return mock_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size)


def mock_varlen_attn_2_10(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    return_aux: object = None,
) -> torch.Tensor:
    """The same with the parameters of torch 2.10."""
    window = (-1, 0) if is_causal else (-1, -1)
    return mock_varlen_attn_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window)


@pytest.fixture(params=[mock_varlen_attn, mock_varlen_attn_2_11, mock_varlen_attn_2_10])
def varlen_attn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", request.param)


@pytest.mark.usefixtures("varlen_attn")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
@pytest.mark.parametrize("n_groups", [1, 2, 4])
def test_what_a_gpu_is_asked_for_is_what_a_cpu_computes(n_groups: int, causal: bool) -> None:
    """With mocks for the kernel of each torch: values, and gradients, which go through repeated keys and values."""
    documents = visibility(IDS, AttentionKernel.flash)
    assert isinstance(documents, Documents)
    documents = documents._replace(release=attention.varlen_release())
    leaves = [
        x.transpose(1, 2).flatten(0, 1).detach().requires_grad_() for x in inputs(4, n_groups, torch.float32)
    ]
    asked = attention._attend_on_gpu(*leaves, documents, causal)
    computed = attention.attend_on_cpu(*leaves, documents.starts, causal)[0]
    torch.testing.assert_close(asked, computed, rtol=0, atol=2e-6)
    dy = torch.randn_like(asked)
    for a, b in zip(*(torch.autograd.grad(y, leaves, dy) for y in (asked, computed)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_compiled_block_takes_the_release_as_a_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not break the graph of each block. With a mock that ignores documents."""

    def causal(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object, is_causal: bool
    ) -> torch.Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), is_causal=is_causal)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", causal)
    documents = visibility(IDS, AttentionKernel.flash)
    assert isinstance(documents, Documents)
    documents = documents._replace(release=10)
    qkv = [x.transpose(1, 2).flatten(0, 1) for x in inputs(4, 2, torch.float32)]
    compiled = torch.compile(attention._attend_on_gpu, backend="eager", fullgraph=True)
    expected = attention._attend_on_gpu(*qkv, documents, True)
    torch.testing.assert_close(compiled(*qkv, documents, True), expected)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
def test_torch_accepts_what_a_gpu_is_asked_for(causal: bool) -> None:
    """torch's own operator on its meta device: names, dtypes and shapes, forward and backward, but no numbers."""
    config = ModelConfig(n_layers=1, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, vocab_size=96)
    with torch.device("meta"):
        model = Decoder(config, 0, replace(PLAIN, attention=AttentionKernel.flash), causal).bfloat16()
        q, k, v = (torch.empty(48, n, 16, dtype=torch.bfloat16) for n in (4, 2, 2))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        documents = Documents(torch.empty(6, dtype=torch.int32), 24)
        y = attention._attend_on_gpu(*leaves, documents, causal)
        assert y.shape == q.shape
        found = torch.autograd.grad(y.sum(), leaves)
        assert [g.shape for g in found] == [x.shape for x in leaves]
        x = torch.empty(2, 24, 32, dtype=torch.bfloat16)
        angles = torch.empty(2, 1, 24, 8)
        assert model.blocks[0](x, angles, angles, documents, None).shape == x.shape


# ---- choosing ----


def config_of(*overrides: str) -> TrainConfig:
    given = ["run_dir=r", "data.manifest=m", "total_steps=200", *overrides]
    return load_config(TrainConfig, given, "config")


@pytest.mark.parametrize(
    ("capability", "overrides", "chosen"),
    [
        (CPU, [], "flash"),
        (CPU, ["engine.precision=fp32", "model.d_head=6"], "flash"),
        (H100, [], "flash"),
        (H100, ["model.d_head=256"], "flash"),
        (H100, ["engine.precision=fp32"], "flex"),
        (H100, ["model.d_head=36"], "flex"),
        (H100, ["model.d_head=12"], "sdpa"),
        (H100._replace(compute=75, triton=False), [], "sdpa"),
        (H100._replace(compute=70), [], "flex"),
        (H100._replace(compute=89), ["model.d_head=192"], "flash"),
        (H100._replace(compute=89), ["model.d_head=256"], "flex"),
    ],
)
def test_the_best_that_works_is_chosen(capability: Capability, overrides: list[str], chosen: str) -> None:
    assert resolve(config_of(*overrides), capability).kernels.attention.value == chosen
    config = config_of(*overrides, f"kernels.attention={chosen}")  # what is chosen may be asked for
    assert resolve(config, capability).kernels.attention.value == chosen


@pytest.mark.parametrize(
    ("capability", "overrides", "words"),
    [
        (CPU, ["kernels.attention=flex"], ["kernels.attention=flex", "CPU", "backward", "auto"]),
        (H100._replace(triton=False), ["kernels.attention=flex"], ["triton"]),
        (H100, ["kernels.attention=flex", "model.d_head=8"], ["at least 16", "model.d_head=8"]),
        (H100, ["kernels.attention=flash", "engine.precision=fp32"], ["engine.precision=fp32", "bf16"]),
        (H100._replace(compute=75), ["kernels.attention=flash"], ["8.0", "7.5"]),
        (H100, ["kernels.attention=flash", "model.d_head=20"], ["multiple of 8", "model.d_head=20"]),
        (H100, ["kernels.attention=flash", "model.d_head=264"], ["256", "model.d_head=264"]),
        (H100._replace(compute=86), ["kernels.attention=flash", "model.d_head=256"], ["192"]),
    ],
)
def test_what_cannot_work_here_is_refused(
    capability: Capability, overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as raised:
        resolve(config_of(*overrides), capability)
    assert all(word in str(raised.value) for word in words), raised.value


def test_this_machine_has_a_kernel() -> None:
    config = config_of("model.vocab_size=64", "model.n_layers=1")
    kernels = resolve(config, capability_of(torch.device("cpu"))).kernels
    ids = torch.arange(12)[None] // 5
    tokens = torch.arange(12)[None]
    chosen, plain = (
        Decoder(config.model, 0, k)(tokens, tokens, document_ids=ids).nll_sum for k in (kernels, PLAIN)
    )
    assert chosen.item() == pytest.approx(plain.item(), rel=1e-6)
