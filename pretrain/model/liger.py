"""Kernels of Liger (Hsu et al., 2024; the package liger-kernel) in place of ours: norms, SwiGLU, output head with loss.

They need a GPU and triton. Its rotary positions are left out: they overwrite queries and keys where they stand, which
selective activation checkpointing keeps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As pretrain.model.decoder.RMSNorm: computed in fp32, x and the result in their own dtype."""
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(x, weight, eps, offset=0.0, casting_mode="gemma", in_place=False)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) x up. The backward pass overwrites both."""
    from liger_kernel.transformers.functional import liger_swiglu

    return liger_swiglu(gate, up)


def nll_sum(hidden: Tensor, weight: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """Sum of the negative log-likelihoods, fp32 scalar, of hidden [N, D], weight [V, D], labels [N].

    Logits exist in part only; gradients are computed in the forward pass and summed in fp32.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(
        hidden, weight, labels, ignore_index=ignored, reduction="sum", accum_dtype=torch.float32
    )
