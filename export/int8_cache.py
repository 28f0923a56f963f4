"""Attention over keys and values as an int8 KV cache gives them back."""

from __future__ import annotations

import torch
from torch import Tensor

from llmserve.model.attention import CausalAttention

__all__ = ["Int8CacheAttention"]

_SMALLEST = 1e-30
"""A head whose largest magnitude is no larger counts as zeros, as in the native runner."""


class Int8CacheAttention(CausalAttention):
    """Whole rows, each token's keys and values rounded to int8 with one scale for each head."""

    def __call__(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, T, H, D], k and v [B, T, KV, D] → [B, T, H, D]."""
        return super().__call__(layer_index, q, _rounded(k), _rounded(v))


def _rounded(heads: Tensor) -> Tensor:
    """[..., D] → the same, each head on 255 steps."""
    largest = heads.abs().amax(-1, keepdim=True)
    is_zero = largest <= _SMALLEST
    inverse = 127.0 / torch.where(is_zero, torch.inf, largest)
    integers = (heads * inverse).round()
    return integers * torch.where(is_zero, 0.0, largest / 127.0)
