"""The matrix product of a layer, and its gradients.

torch's own `F.linear` keeps a transposed view of the weight for the backward pass. Under ZeRO-3, which lets go of a
gathered weight by giving the parameter other storage, that view would hold all of it until then: every weight of the
model on every device, at the end of the forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., I] @ weight [O, I] transposed -> [..., O], as `F.linear`; keeps x and the weight itself."""
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
