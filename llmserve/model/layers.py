"""The parts of a decoder: projections, norms, positions, attention's projections, feed-forward.

Written from torch's primitive operations. Query, key and value share one matrix product, as do
gate and input of the feed-forward: at one row, what counts is how few operations there are and how
few times memory is walked.

Sources: RMSNorm arXiv 1910.07467; RoPE arXiv 2104.09864, in the halves layout of Hugging Face's
Llama; its scaling for long contexts arXiv 2306.15595 (linear) and Llama 3.1; SwiGLU arXiv
2002.05202; sinusoids arXiv 1706.03762, section 3.5.

Shapes: T tokens, E hidden_size, H query heads, KV key heads, D head_dim; leading axes are free.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from .adapt import Adapt, project
from .attention import Attend

__all__ = [
    "Attention",
    "Embedding",
    "LayerNorm",
    "Linear",
    "Mlp",
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

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] → [..., E]."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


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
    kind = RmsNorm if config.norm == "rmsnorm" else LayerNorm
    return kind(config.hidden_size, config.norm_eps)


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each pair of a head's values, float32 [D / 2], on the CPU."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / config.rope_theta ** (exponents / config.head_dim)
    scaling = config.rope_scaling
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

    cos: Tensor  # [..., T, 1, 1, D/2]
    signed_sin: Tensor  # [..., T, 1, 2, D/2]: -sin for the first half, sin for the second


class RotaryTable:
    """Cosines and sines of every position, made once in float32, as far as they are asked for.

    Not a module: a model that is turned to bfloat16 must keep them exact.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._max_seq_len = config.max_seq_len
        self._frequencies = rotary_frequencies(config)
        self._table = self._make(min(config.max_seq_len, _FIRST_ROTARY_ROWS))

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """The turn that belongs to `positions` [..., T], as numbers of type `dtype`."""
        if len(self._table) < self._max_seq_len and len(self._table) <= int(positions.max()):
            doubled = 2 * (int(positions.max()) + 1)
            self._table = self._make(min(self._max_seq_len, doubled))
        if self._table.device != positions.device:
            self._table = self._table.to(positions.device)
        rows = self._table[positions].to(dtype).unsqueeze(-3)  # [..., T, 1, 3, D/2]
        return Rotation(rows[..., :1, :], rows[..., 1:, :])

    def _make(self, count: int) -> Tensor:
        positions = torch.arange(count, dtype=torch.float32, device="cpu")
        angles = positions[:, None] * self._frequencies
        sin = angles.sin()
        return torch.stack((angles.cos(), -sin, sin), dim=1)


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Turn each head's pairs (i, i + D/2): [..., T, any number of heads, D] → the same shape."""
    halves = heads.view(*heads.shape[:-1], 2, heads.shape[-1] // 2)
    # (a, b) → (a cos - b sin, b cos + a sin): both halves at once.
    turned = torch.addcmul(halves * rotation.cos, halves.flip(-2), rotation.signed_sin)
    return turned.view(heads.shape)


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Fixed position vectors, float32 [..., T, width]: sine and cosine by turns."""
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device)
    angles = positions[..., None].float() / 10_000.0 ** (exponents / width)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


class Attention(nn.Module):
    """Projections around attention; where keys and values are kept is `attend`'s business."""

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        fused = config.q_size + 2 * config.kv_size
        self.qkv_proj = Linear(config.hidden_size, fused, bias=config.attention_bias)
        self.o_proj = Linear(config.q_size, config.hidden_size, bias=config.attention_output_bias)

    def forward(
        self, x: Tensor, rotation: Rotation | None, attend: Attend, adapt: Adapt | None = None
    ) -> Tensor:
        """[..., T, E] → [..., T, E]."""
        qkv = project(self.qkv_proj, x, adapt, self.layer_index, "qkv_proj")
        qkv = qkv.view(*x.shape[:-1], -1, self.head_dim)  # [..., T, H + 2 KV, D]
        num_rotated = self.num_heads + self.num_kv_heads
        qk, v = torch.split(qkv, [num_rotated, self.num_kv_heads], dim=-2)
        if rotation is not None:
            qk = rotate(qk, rotation)
        q, k = torch.split(qk, [self.num_heads, self.num_kv_heads], dim=-2)
        out = attend(self.layer_index, q, k, v)  # [..., T, H, D]
        return project(self.o_proj, out.flatten(-2), adapt, self.layer_index, "o_proj")


class Mlp(nn.Module):
    """Feed-forward: gated SiLU, or one hidden layer with GELU."""

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation = config.activation
        if config.is_gated:
            self.gate_up_proj = Linear(width, 2 * inner, bias=bias)
        else:
            self.up_proj = Linear(width, inner, bias=bias)
        self.down_proj = Linear(inner, width, bias=bias)

    def forward(self, x: Tensor, adapt: Adapt | None = None) -> Tensor:
        """[..., E] → [..., E]."""
        if self.activation == "swiglu":
            both = project(self.gate_up_proj, x, adapt, self.layer_index, "gate_up_proj")
            gate, up = both.chunk(2, dim=-1)
            inner = F.silu(gate) * up
        else:
            approximate = "tanh" if self.activation == "gelu_tanh" else "none"
            inner = project(self.up_proj, x, adapt, self.layer_index, "up_proj")
            inner = F.gelu(inner, approximate=approximate)
        return project(self.down_proj, inner, adapt, self.layer_index, "down_proj")
