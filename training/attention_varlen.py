"""Attention within documents on a GPU: one call over all of them, whatever their lengths.

torch's kernel (`torch.nn.attention.varlen`, FlashAttention's, arXiv 2307.08691) takes the rows as
one packed axis and the places where documents begin, so that no mask of [T, T] is made and nothing
is computed between two documents.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import varlen

from llmserve.config import ModelConfig

from .devices import to_device

__all__ = ["VarlenAttention"]

_MAX_HEAD_DIM, _HEAD_DIM_STEP = 256, 8  # of the kernel
_LEAST_DOCUMENTS = 64


class VarlenAttention:
    """An `Attend` over rows of several documents, in a type of two bytes."""

    def __init__(self, config: ModelConfig, positions: Tensor, device: torch.device) -> None:
        """`positions` [B, T] in the host's memory: they begin at 0 with every document."""
        self._config = config
        self._longest = positions.shape[1]
        self._starts = to_device(_starts(positions), device)

    @staticmethod
    def takes(config: ModelConfig) -> bool:
        """Whether the kernel computes the model's attention."""
        head_dim = config.head_dim
        is_shape = head_dim <= _MAX_HEAD_DIM and head_dim % _HEAD_DIM_STEP == 0
        return is_shape and config.attention_softcap is None

    def __call__(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from q [B, T, H, D] to k, v [B, T, K, D], of which H/K heads share each."""
        window = self._config.window_of(layer_index)
        out = varlen.varlen_attn(
            q.flatten(0, 1).to(v.dtype),
            k.flatten(0, 1).to(v.dtype),
            v.flatten(0, 1),
            self._starts,
            self._starts,
            self._longest,
            self._longest,
            scale=self._config.score_scale,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return torch.as_tensor(out).view(q.shape)


def _starts(positions: Tensor) -> Tensor:
    """Where documents begin in the packed axis, int32, and its length for all that are not there.

    There are as many as a power of two: a compiled model is compiled once for each number.
    """
    begins = torch.nonzero(positions.flatten() == 0).flatten()
    count = max(_LEAST_DOCUMENTS, 1 << (len(begins) - 1).bit_length())
    starts = torch.full((count + 1,), positions.numel(), dtype=torch.int32)
    starts[: len(begins)] = begins
    return starts
