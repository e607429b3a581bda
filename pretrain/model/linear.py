"""The matrix product of a linear layer, and its gradients.

torch's `F.linear` keeps a transposed view of the weight for the backward pass. ZeRO-3 releases a gathered weight by
giving the parameter other storage, but such a view would keep the gathered storage alive: at the end of the forward
pass, every device would hold every weight of the model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., I] @ weight [O, I] transposed -> [..., O], like `F.linear`. Keeps x and the weight, not a view."""
    return _Linear.apply(x, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        dw = dy.flatten(0, -2).t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return dx, dw
