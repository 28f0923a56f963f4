"""RMSNorm with a gradient of its own.

torch computes the norm as a chain of operations and differentiates each: on a CPU that walks the
rows some twenty times and keeps three arrays for the backward pass. Here it walks them eight times
and keeps the input and one number for each row. The forward pass makes torch's bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["rms_norm"]


class _RmsNorm(torch.autograd.Function):
    """y = x · r · w with r = 1 / sqrt(mean(x²) + eps), over rows [..., E] of float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)  # [..., 1]
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None]:
        """With n = x · r and g the gradient of y: dx = r · (g · w - n · mean(g · w · n))."""
        grad: Tensor = grads[0]
        x, weight, inverse = ctx.saved_tensors
        normalized = x * inverse
        products = grad * normalized
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = products.flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            mean = (products @ weight).div_(x.shape[-1]).unsqueeze(-1)
            grad_x = (grad * weight).sub_(normalized.mul_(mean)).mul_(inverse)
        return grad_x, grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rows [..., E] of float32, normalized and scaled by `weight` [E] of float32."""
    normalized: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return normalized
