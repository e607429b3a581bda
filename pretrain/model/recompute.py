"""Activation checkpointing: the backward pass recomputes some activations, so that they need not be kept in memory."""

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
    """function(*args), keeping only the intermediate results that `mode` says for the backward pass.

    Losses and gradients are bit-identical to those without recomputation, since it draws the same random numbers.
    """
    if mode is Recompute.none or not torch.is_grad_enabled():
        return function(*args)
    if mode is Recompute.full:
        return checkpoint(function, *args, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, _keep)
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


# Selective mode keeps the results of the operators that cost the most to recompute per byte: products with weights, and
# attention. Everything else (norms, rotary embedding, SwiGLU) is cheap. The names are those of torch's dispatcher. They
# are strings because some of these operators exist only after an import.
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
