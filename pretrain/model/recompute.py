"""Activation checkpointing: what the backward pass computes again, so that it need not be kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from pretrain.config import Recompute


def recomputed(mode: Recompute, function: Callable[..., Tensor], *args: Any) -> Tensor:
    """function(*args), of whose intermediate results only those are kept for the backward pass that `mode` keeps.

    Losses and gradients are those without, bit by bit: random numbers are drawn as the first time.
    """
    if mode is Recompute.none or not torch.is_grad_enabled():
        return function(*args)
    if mode is Recompute.full:
        return checkpoint(function, *args, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, _keep)
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


# What costs most per byte kept: products with weights, and attention. All else (norms, rotary positions, SwiGLU) is
# cheap. Named as the dispatcher names them: some exist only once they are imported.
_KEPT = {
    "aten::mm",
    "aten::_scaled_mm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "torch_attn::_varlen_attn",
    "flex_attention",
    "pretrain::attend_on_cpu",
}


def _keep(_: SelectiveCheckpointContext, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator.name() in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
