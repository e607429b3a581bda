"""Matrix products of activations and weights in 8-bit floating point, forward and backward (Micikevicius et al., 2022).

Each factor has one scale, chosen so that its largest value becomes the largest value of the format. The format is e4m3
for activations and weights, and e5m2, which has more range, for gradients. The scales are computed each time from the
current values. The stored weights and their gradients keep their precision. This is torchao's "tensorwise" recipe.

Shapes: N tokens, I and O widths. I, O and N must be multiples of 16, as `torch._scaled_mm` requires.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_E4M3, _E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., I] @ weight [O, I] transposed -> [..., O] in the dtype of x, like F.linear."""
    return _Product.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])


class _Product(torch.autograd.Function):
    """Keeps the weight itself for the backward pass. A view would keep ZeRO-3 from releasing it (see `linear.py`)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        x8, x_scale = _rounded(x, _E4M3)
        w8, w_scale = _rounded(weight, _E4M3)
        return _multiplied(x8, x_scale, w8.t(), w_scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        dy8, dy_scale = _rounded(dy, _E5M2)
        x8, x_scale = _rounded(x, _E4M3)
        w8, w_scale = _rounded(weight, _E4M3)
        dx = _multiplied(dy8, dy_scale, w8, w_scale, x.dtype)
        dw = _multiplied(dy8.t(), dy_scale, x8, x_scale, weight.dtype)
        return dx, dw


def _rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in 8 bits, and the fp32 scalar by which it must be multiplied to restore x."""
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=1e-12) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


def _multiplied(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool = False
) -> Tensor:
    """a [M, K] @ b [K, N] times both scales. `fast` accumulates with less than fp32 precision.

    `torch._scaled_mm` needs a in row-major and b in column-major order.
    """
    # The scales are passed as one product, because when they are applied one after the other, the first can overflow
    # (seen with oneDNN on a CPU with AMX).
    return torch._scaled_mm(
        a.contiguous(),
        b.t().contiguous().t(),
        scale_a=a_scale * b_scale,
        scale_b=torch.ones_like(b_scale),
        out_dtype=dtype,
        use_fast_accum=fast,
    )
