"""The smallest parts of a decoder: projections, norms, positions.

Written from torch's primitive operations.

Sources: RMSNorm arXiv 1910.07467; RoPE arXiv 2104.09864, in the halves layout of Hugging Face's
Llama; its scaling for long contexts arXiv 2306.15595 (linear) and Llama 3.1; sinusoids arXiv
1706.03762, section 3.5.

Shapes: T tokens, E hidden_size, D head_dim, R rotary_size; leading axes are free.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from .rms_norm import rms_norm

__all__ = [
    "Embedding",
    "LayerNorm",
    "Linear",
    "RmsNorm",
    "RotaryTable",
    "Rotation",
    "make_norm",
    "rotary_frequencies",
    "rotate",
    "sinusoids",
]

_FIRST_ROTARY_ROWS = 4096


class Linear(nn.Module):
    """y = x Wᵀ + b, with W [out, in]."""

    def __init__(self, width: int, out: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, width))
        self.bias = nn.Parameter(torch.empty(out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """One learned vector for each id."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))

    def forward(self, ids: Tensor) -> Tensor:
        """[...] ids → [..., width]."""
        return F.embedding(ids, self.weight)


class RmsNorm(nn.Module):
    """Division by the root of the mean square; the sum is made in float32."""

    def __init__(self, width: int, eps: float, offset: float = 0.0) -> None:
        """Scale by the weight plus `offset`."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] → [..., width]."""
        if not self.offset:
            return _rms_norm(x, self.weight, self.eps)
        # In float32 throughout: 1 + a small weight would lose the weight in bfloat16.
        return _rms_norm(x.float(), self.weight.float() + self.offset, self.eps).to(x.dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same bits either way; with a gradient of its own where one may be asked for."""
    is_differentiated = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if is_differentiated and x.dtype == weight.dtype == torch.float32 and x.ndim > 1:
        return rms_norm(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


class LayerNorm(nn.Module):
    """Mean 0 and variance 1 over the width, then scale and shift."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] → [..., E]."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def make_norm(config: ModelConfig) -> RmsNorm | LayerNorm:
    """The norm that the configuration asks for."""
    if config.norm == "layernorm":
        return LayerNorm(config.hidden_size, config.norm_eps)
    return RmsNorm(config.hidden_size, config.norm_eps, config.norm_weight_offset)


def rotary_frequencies(config: ModelConfig, *, is_local: bool = False) -> Tensor:
    """Angle per position of each pair of a head's values, float32 [R / 2], on the CPU.

    `is_local` asks for the layers with `ModelConfig.has_local_rope`.
    """
    theta, scaling = config.rope_theta, config.rope_scaling
    if is_local and config.local_rope_theta is not None:
        theta, scaling = config.local_rope_theta, None
    size = config.rotary_size
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / theta ** (exponents / size)
    if scaling is None:
        return frequencies
    slowed = frequencies / scaling.factor
    if scaling.kind == "linear":
        return slowed
    # llama3: short waves stay, long ones are slowed, those between are blended.
    turns = scaling.original_max_seq_len * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - kept) * slowed + kept * frequencies


class Rotation(NamedTuple):
    """How far each token's pairs are turned; broadcast over leading axes and heads."""

    cos: Tensor  # [..., T, 1, 1, R/2]
    signed_sin: Tensor  # [..., T, 1, 2, R/2]: -sin for the first half, sin for the second


class RotaryTable:
    """Cosines and sines of every position, made once in float32, as far as they are asked for.

    Not a module: a model that is turned to bfloat16 must keep them exact.
    """

    def __init__(self, config: ModelConfig, *, is_local: bool = False) -> None:
        self._max_seq_len = config.max_seq_len
        self._frequencies = rotary_frequencies(config, is_local=is_local)
        self._table = self._make(min(config.max_seq_len, _FIRST_ROTARY_ROWS))
        self._is_complete = False

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """The turn that belongs to `positions` [..., T], as numbers of type `dtype`."""
        is_short = not self._is_complete and len(self._table) < self._max_seq_len
        if is_short and len(self._table) <= int(positions.max()):
            doubled = 2 * (int(positions.max()) + 1)
            self._table = self._make(min(self._max_seq_len, doubled))
        if self._table.device != positions.device:
            self._table = self._table.to(positions.device)
        rows = self._table[positions].to(dtype).unsqueeze(-3)  # [..., T, 1, 3, R/2]
        return Rotation(rows[..., :1, :], rows[..., 1:, :])

    def complete(self, count: int, device: torch.device) -> None:
        """Make the table of the positions before `count`, there; no later one is asked for.

        From now on no position is looked at before it is used.
        """
        self._table = self._make(min(self._max_seq_len, count)).to(device)
        self._is_complete = True

    def _make(self, count: int) -> Tensor:
        positions = torch.arange(count, dtype=torch.float32, device="cpu")
        angles = positions[:, None] * self._frequencies
        sin = angles.sin()
        return torch.stack((angles.cos(), -sin, sin), dim=1)


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Turn each head's pairs (i, i + R/2): [..., T, any number of heads, D] → the same shape."""
    size = 2 * rotation.cos.shape[-1]
    if size < heads.shape[-1]:
        return torch.cat((rotate(heads[..., :size], rotation), heads[..., size:]), dim=-1)
    halves = heads.view(*heads.shape[:-1], 2, size // 2)
    # (a, b) → (a cos - b sin, b cos + a sin): both halves at once.
    turned = torch.addcmul(halves * rotation.cos, halves.flip(-2), rotation.signed_sin)
    return turned.view(heads.shape)


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Fixed position vectors, float32 [..., T, width]: sine and cosine by turns."""
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device)
    angles = positions[..., None].float() / 10_000.0 ** (exponents / width)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)
