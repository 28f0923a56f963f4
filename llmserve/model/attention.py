"""Attention behind one interface: the model says what, the caller how the keys are kept.

`CausalAttention` keeps nothing (training, evaluation); `DenseCache` keeps the keys and values of
one batch in plain tensors (the plain loop, the oracle of exports); the paged cache of the torch
runner is a third. Grouped heads are left to the kernel, which reads each key head once: on CPUs
faster than copies of the keys for every query head, at one row and at many. In a layer with a
sliding window each token sees the last `window` tokens, itself included (Mistral 7B, arXiv
2310.06825, section 2).

Shapes: B batch, T new tokens, S all tokens so far, H query heads, KV key heads, D head_dim.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import ConfigError
from .scores import Scores

__all__ = ["Attend", "CausalAttention", "DenseCache"]


class Attend(Protocol):
    """Attention of one layer's new tokens over whatever the implementation keeps."""

    def __call__(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [..., T, H, D] with new keys and values [..., T, KV, D] → [..., T, H, D]."""


class CausalAttention:
    """Every token of a whole row [B, T] attends to itself and those before it."""

    def __init__(self, config: ModelConfig) -> None:
        self._config, self._scores = config, Scores.of(config)

    def __call__(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, T, H, D], k and v [B, T, KV, D] → [B, T, H, D]."""
        window = self._config.window_of(layer_index)
        return _attend(self._scores, q, k.transpose(1, 2), v.transpose(1, 2), window)


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
        self._config, self._scores = config, Scores.of(config)
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
        return _attend(self._scores, q, keys, values, self._config.window_of(layer_index))


def _attend(scores: Scores, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """q [B, T, H, D] of the last T tokens, k and v [B, KV, S, D] of all → [B, T, H, D]."""
    num_new, past = q.shape[1], k.shape[2] - q.shape[1]
    if window is not None and past >= window:  # what no query sees is not read
        first = past - window + 1
        k, v, past = k[:, :, first:], v[:, :, first:], past - first
    is_banded = window is not None and past + num_new > window
    mask = None
    if num_new > 1 and (past or is_banded):
        mask = torch.ones(num_new, past + num_new, dtype=torch.bool, device=q.device).tril_(past)
        if window is not None:
            mask.triu_(past - window + 1)
    is_causal = mask is None and num_new > 1
    out = scores.attend(q.transpose(1, 2), k, v, mask=mask, is_causal=is_causal)
    return out.transpose(1, 2)
