"""Attention for training: as matrix products in two bytes, and within documents that share a row.

T tokens, H query heads, K key-value heads, D head_dim. torch's fused attention keeps no [T, T]
scores, but its backward pass on a CPU runs at a fraction of the speed of plain bfloat16 matrix
products: at 256 tokens the plain form takes half the time forward and backward together. Scores of
the contexts that small models are trained with fit in memory easily.

Rows of several documents say so by their positions, which begin at 0 with each of them: a token
sees those of its own document alone, so that every document is computed as if it stood alone.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from llmserve.config import ModelConfig
from llmserve.errors import ConfigError
from llmserve.model.attention import Attend, CausalAttention
from llmserve.model.scores import Scores

__all__ = ["MatrixAttention", "PackedAttention", "document_mask", "make_attention"]

_MAX_MATRIX_CONTEXT = 1024
"""Longest context whose scores are kept whole."""


def make_attention(
    config: ModelConfig, positions: Tensor | None, *, is_mixed: bool, device: torch.device
) -> Attend:
    """The attention of a batch of training rows.

    Args:
        config: The model.
        positions: [B, T] in the host's memory, each token's place in its document; None: every row
            is one text.
        is_mixed: Whether products are made in a type of two bytes.
        device: Where the batch is computed.

    Raises:
        ConfigError: such a type for a model whose scores are capped, on a CPU.
    """
    is_cpu = device.type == "cpu"
    if is_mixed and is_cpu and config.max_seq_len <= _MAX_MATRIX_CONTEXT:
        return MatrixAttention(config, positions)
    if positions is None:
        return CausalAttention(config)
    if is_mixed and not is_cpu:
        from .attention_varlen import VarlenAttention

        if VarlenAttention.takes(config):
            return VarlenAttention(config, positions, device)
    return PackedAttention(config, positions.to(device))


class PackedAttention:
    """An `Attend` over rows of several documents, by torch's fused kernel. O(T²) memory."""

    def __init__(self, config: ModelConfig, positions: Tensor) -> None:
        """`positions` [B, T]: each token's place in its document."""
        self._config, self._scores = config, Scores.of(config)
        self._masks = _DocumentMasks(positions)

    def __call__(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from q [B, T, H, D] to k, v [B, T, K, D], of which H/K heads share each."""
        mask = self._masks.of_window(self._config.window_of(layer_index)).unsqueeze(1)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return self._scores.attend(q, k, v, mask=mask).transpose(1, 2)


class MatrixAttention:
    """An `Attend` over whole rows, of one text or of several. O(T²) memory."""

    def __init__(self, config: ModelConfig, positions: Tensor | None = None) -> None:
        """`positions` [B, T] as for `PackedAttention`; None: every row is one text.

        Raises `ConfigError` for a model whose scores are capped.
        """
        if config.attention_softcap is not None:
            raise ConfigError(
                "attention_softcap is not supported in training with bfloat16 or float16"
            )
        self._config = config
        self._masks = None if positions is None else _DocumentMasks(positions)

    def __call__(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from q [B, T, H, D] to k, v [B, T, K, D], of which H/K heads share each."""
        batch, tokens, heads, width = q.shape
        kv_heads = k.shape[2]
        group = heads // kv_heads
        with torch.autocast(q.device.type, enabled=False):
            q = q.to(v.dtype) * self._config.score_scale
            q = q.view(batch, tokens, kv_heads, group, width).permute(0, 2, 3, 1, 4)
            q = q.reshape(batch * kv_heads, group * tokens, width)
            k = k.to(v.dtype).permute(0, 2, 3, 1).reshape(batch * kv_heads, width, tokens)
            scores = torch.bmm(q, k).view(batch, -1, tokens, tokens)  # [B, H, T, T]
            weights = (scores + self._mask(layer_index, tokens, v.dtype)).softmax(-1)
            v = v.transpose(1, 2).reshape(batch * kv_heads, tokens, width)
            out = torch.bmm(weights.view(batch * kv_heads, group * tokens, tokens), v)
        out = out.view(batch, kv_heads, group, tokens, width).permute(0, 3, 1, 2, 4)
        return out.reshape(batch, tokens, heads, width)

    def _mask(self, layer_index: int, tokens: int, dtype: torch.dtype) -> Tensor:
        """What is added to the scores, [T, T] or [B, 1, T, T]: 0 or minus infinity."""
        window = self._config.window_of(layer_index)
        if self._masks is None:
            return _mask(tokens, window, dtype)
        seen = self._masks.of_window(window).unsqueeze(1)
        return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))


class _DocumentMasks:
    """`document_mask` for every window that layers ask for, each made once."""

    def __init__(self, positions: Tensor) -> None:
        self._positions = positions
        self._masks: dict[int | None, Tensor] = {}

    def of_window(self, window: int | None) -> Tensor:
        if window not in self._masks:
            self._masks[window] = document_mask(self._positions, window)
        return self._masks[window]


def document_mask(positions: Tensor, window: int | None = None) -> Tensor:
    """[B, T, T], true where the row's token sees the column's: its own document's, up to itself.

    `positions` [B, T] begin at 0 with every document; `window`: how many tokens one sees, itself
    included.
    """
    document = (positions == 0).cumsum(-1)  # [B, T]
    is_same = document.unsqueeze(-1) == document.unsqueeze(-2)
    seen = is_same.tril()
    return seen if window is None else seen.triu(1 - window)


@lru_cache(maxsize=8)
def _mask(tokens: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[T, T], 0 where the row's token sees the column's, minus infinity elsewhere."""
    hidden = torch.full((tokens, tokens), float("-inf"), dtype=dtype)
    later = hidden.triu(1)
    return later if window is None else later + hidden.tril(-window)
