"""Liger kernels (Hsu et al., 2024; the package liger-kernel) that replace ours: norms, SwiGLU, output head with loss.

They need a GPU and triton. Liger's rotary embedding is not used: it overwrites queries and keys in place, and selective
activation checkpointing keeps those tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same as pretrain.model.decoder.RMSNorm: computed in fp32, with the result in the dtype of x."""
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(x, weight, eps, offset=0.0, casting_mode="gemma", in_place=False)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, element-wise. The backward pass overwrites both inputs."""
    from liger_kernel.transformers.functional import liger_swiglu

    return liger_swiglu(gate, up)


def nll_sum(hidden: Tensor, weight: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """Sum of the negative log-likelihoods as an fp32 scalar, from hidden [N, D], weight [V, D] and labels [N].

    Only a part of the logits is in memory at a time. The gradients are computed in the forward pass and summed in fp32.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(
        hidden, weight, labels, ignore_index=ignored, reduction="sum", accum_dtype=torch.float32
    )
