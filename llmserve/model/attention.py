"""Attention behind one interface: the model says what, the caller how the keys are kept.

`CausalAttention` keeps nothing (training, evaluation); `DenseCache` keeps the keys and values of
one batch in plain tensors (the plain loop, the oracle of exports); the paged cache of the torch
runner is a third. Grouped heads are left to the kernel, which reads each key head once: on CPUs
faster than copies of the keys for every query head, at one row and at many.

Shapes: B batch, T new tokens, S all tokens so far, H query heads, KV key heads, D head_dim.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import ModelConfig
from ..errors import ConfigError

__all__ = ["Attend", "CausalAttention", "DenseCache"]


class Attend(Protocol):
    """Attention of one layer's new tokens over whatever the implementation keeps."""

    def __call__(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [..., T, H, D] with new keys and values [..., T, KV, D] → [..., T, H, D]."""


class CausalAttention:
    """Every token of a whole row [B, T] attends to itself and those before it."""

    def __call__(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, T, H, D], k and v [B, T, KV, D] → [B, T, H, D]."""
        return _attend(q, k.transpose(1, 2), v.transpose(1, 2), mask=None, is_causal=True)


class DenseCache:
    """Keys and values of one batch of equally long rows, every layer, in contiguous tensors.

    A pass over all layers adds its tokens; the last layer's call moves `length` on.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch_size: int = 1,
        max_len: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocate room for `max_len` tokens in each row (None: the model's whole context)."""
        self.length = 0
        """Tokens kept in each row."""
        self.max_len = max_len or config.max_seq_len
        shape = (config.num_layers, batch_size, config.num_kv_heads, self.max_len, config.head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=device).unbind()
        self._values = torch.empty(shape, dtype=dtype, device=device).unbind()

    def __call__(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, T, H, D], k and v [B, T, KV, D] → [B, T, H, D].

        Raises:
            ConfigError: the cache has no room for T more tokens.
        """
        num_new = q.shape[1]
        start, end = self.length, self.length + num_new
        if end > self.max_len:
            raise ConfigError(f"the cache holds {self.max_len} tokens; {end} are needed")
        keys, values = self._keys[layer_index][:, :, :end], self._values[layer_index][:, :, :end]
        keys[:, :, start:] = k.transpose(1, 2)
        values[:, :, start:] = v.transpose(1, 2)
        if layer_index == len(self._keys) - 1:
            self.length = end
        mask = None
        if start and num_new > 1:
            mask = torch.ones(num_new, end, dtype=torch.bool, device=q.device).tril(start)
        return _attend(q, keys, values, mask=mask, is_causal=not start and num_new > 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, is_causal: bool) -> Tensor:
    """q [B, T, H, D], k and v [B, KV, S, D] → [B, T, H, D]."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k,
        v,
        attn_mask=mask,
        is_causal=is_causal,
        enable_gqa=k.shape[1] != q.shape[2],
    )
    return out.transpose(1, 2)
