"""The attention kernels, and which token attends to which, in the form that each kernel needs.

`visibility` is called once per forward pass, and its result is passed to `attend` in every layer. The result consists
of tensors, so activation checkpointing and torch.compile can handle it. A token attends to itself and to earlier tokens
of its own document, and without `causal` also to later ones. The tokens of a document are contiguous.

Shapes: B batch, T sequence, S key positions, H query heads, G key/value heads, K head width, N = B T, D documents.
"""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.config import AttentionKernel

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class Documents(NamedTuple):
    """Where each document of a batch starts, with the batch seen as one row of N tokens.

    A document that continues in the next sequence counts as a new document there.
    """

    starts: Tensor
    """int32 [D + 1]: the first token of each document, then N."""
    longest: int
    """Upper bound on the number of tokens in a document: T."""
    release: int = 12
    """Result of `varlen_release` on a GPU. It is stored here because a compiled block cannot inspect signatures."""


Visibility: TypeAlias = "Tensor | Documents | BlockMask | None"
"""Which tokens a token sees. None: all (earlier) ones. Tensor: bool [B, 1, T, S], True where a query sees a key."""


def visibility(document_ids: Tensor | None, kernel: AttentionKernel, causal: bool = True) -> Visibility:
    """The `visible` argument of `attend`, from document ids [B, T]; without document ids, the sequence is one document.

    `attend` needs the same `causal`.
    """
    if document_ids is None:
        return None
    match kernel:
        case AttentionKernel.flash:
            return _documents(document_ids)
        case AttentionKernel.flex:
            return _block_mask(document_ids, causal)
        case _:
            return _mask(document_ids, causal)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Visibility, causal: bool = True) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over what is visible: q [B, H, T, K], k and v [B, G, S, K] -> [B, H, T, K].

    Query head h reads key/value head h // (H / G).
    """
    n_repeats = q.shape[1] // k.shape[1]
    if visible is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=n_repeats > 1)
    if isinstance(visible, Tensor):
        if n_repeats > 1:
            # No fast CUDA kernel takes both a mask and grouped queries; the fallback would materialize all scores.
            k, v = k.repeat_interleave(n_repeats, dim=1), v.repeat_interleave(n_repeats, dim=1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    if isinstance(visible, Documents):
        return _attend_by_document(q, k, v, visible, causal)
    return _attend_by_blocks(q, k, v, visible)


def _mask(document_ids: Tensor, causal: bool) -> Tensor:
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same.tril() if causal else same


# ---- flash: each document separately, so that nothing is computed and then masked ----------------------------------


def _documents(document_ids: Tensor) -> Documents:
    first = torch.ones_like(document_ids, dtype=torch.bool)
    first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    # On a GPU this waits for the device once per forward pass, because the number of documents determines the shape.
    starts = first.flatten().nonzero()[:, 0]
    starts = F.pad(starts, (0, 1), value=document_ids.numel()).to(torch.int32)
    release = varlen_release() if starts.device.type == "cuda" else 12
    return Documents(starts, document_ids.shape[1], release)


def _attend_by_document(q: Tensor, k: Tensor, v: Tensor, documents: Documents, causal: bool) -> Tensor:
    n_rows = q.shape[0]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [N, heads, K]
    if q.device.type == "cpu":
        y, _ = attend_on_cpu(q, k, v, documents.starts, causal)
    else:
        y = _attend_on_gpu(q, k, v, documents, causal)
    return y.unflatten(0, (n_rows, -1)).transpose(1, 2)


def _attend_on_gpu(q: Tensor, k: Tensor, v: Tensor, documents: Documents, causal: bool) -> Tensor:
    """FlashAttention-2 (Dao, 2023), as implemented in torch."""
    from torch.nn.attention.varlen import varlen_attn

    starts, longest, release = documents
    # A window is the number of tokens that are seen before and after; -1 means all.
    window = (-1, 0) if causal else (-1, -1)
    options: dict[str, Any] = {"is_causal": causal} if release == 10 else {"window_size": window}
    if release >= 12:
        options["enable_gqa"] = True
    elif q.shape[1] > k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return varlen_attn(q, k, v, starts, starts, longest, longest, **options)  # type: ignore[return-value]


def varlen_release() -> int:
    """Which version of `varlen_attn` this torch has: 10, 11 or 12, for torch 2.10, 2.11, and 2.12 or later.

    Version 2.10 takes `is_causal`, later ones take `window_size`, and 2.12 supports grouped queries itself.
    """
    from torch.nn.attention.varlen import varlen_attn  # takes 2 s to import

    names = inspect.signature(varlen_attn).parameters
    return 12 if "enable_gqa" in names else 11 if "window_size" in names else 10


@torch.library.custom_op("pretrain::attend_on_cpu", mutates_args=())
def attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention within each document: q [N, H, K], k and v [N, G, K] -> [N, H, K], and fp32 log-sum-exps [N, H].

    It is one custom operator because torch.compile cannot trace data-dependent shapes, and because autograd over many
    small parts is slow.
    """
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    for start, stop in pairwise(starts.tolist()):
        y, lse_of_heads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *_heads(q.shape[1], start, stop, q, k, v), is_causal=causal
        )
        out[start:stop], lse[start:stop] = y[0].transpose(0, 1), lse_of_heads[0].transpose(0, 1)
    return out, lse


@attend_on_cpu.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("pretrain::attend_on_cpu_backward", mutates_args=())
def _attend_on_cpu_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, starts: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    n_heads, n_groups = q.shape[1], k.shape[1]
    for start, stop in pairwise(starts.tolist()):
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *_heads(n_heads, start, stop, dy, q, k, v, y),
            lse[start:stop].transpose(0, 1)[None],
            0.0,
            is_causal=causal,
        )
        dq_part, dk_part, dv_part = (x[0].transpose(0, 1) for x in found)  # [n, H, K]
        dq[start:stop] = dq_part
        dk[start:stop] = dk_part.unflatten(1, (n_groups, -1)).sum(2)
        dv[start:stop] = dv_part.unflatten(1, (n_groups, -1)).sum(2)
    return dq, dk, dv


@_attend_on_cpu_backward.register_fake
def _(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, starts: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _heads(n_heads: int, start: int, stop: int, *tensors: Tensor) -> list[Tensor]:
    """The n tokens [start, stop) of each [N, heads, K] as [1, n_heads, n, K], with key heads repeated as needed."""
    parts = (x[start:stop] for x in tensors)
    return [x.repeat_interleave(n_heads // x.shape[1], dim=1).transpose(0, 1)[None] for x in parts]


def _save_for_backward(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    q, k, v, starts, ctx.causal = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(q, k, v, *output, starts)


def _backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor, _: Tensor | None) -> tuple:
    return *_attend_on_cpu_backward(dy, *ctx.saved_tensors, ctx.causal), None, None  # type: ignore[attr-defined]


attend_on_cpu.register_autograd(_backward, setup_context=_save_for_backward)


# ---- flex: blocks that are masked entirely are skipped --------------------------------------------------------------


def _block_mask(document_ids: Tensor, causal: bool) -> BlockMask:
    from torch.nn.attention.flex_attention import create_block_mask

    def same(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return document_ids[row, query] == document_ids[row, key]

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & same(row, head, query, key)

    n_rows, length = document_ids.shape
    # When compiled, this never materializes the full [B, 1, T, T] mask.
    make = create_block_mask if document_ids.device.type == "cpu" else torch.compile(create_block_mask)
    return make(sees if causal else same, n_rows, None, length, length, device=document_ids.device)


def _attend_by_blocks(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask) -> Tensor:
    """FlexAttention (Dong et al., 2024).

    Compiled, it is one fused kernel. On a CPU it is not compiled: it then computes all scores and has no backward pass.
    """
    from torch.nn.attention.flex_attention import flex_attention

    inside = torch.compiler.is_compiling() or q.device.type == "cpu"
    flex = flex_attention if inside else torch.compile(flex_attention)
    return flex(q, k, v, block_mask=blocks, enable_gqa=True)  # type: ignore[return-value]
