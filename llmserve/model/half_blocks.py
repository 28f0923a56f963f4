"""The two halves of a block: attention with its projections, and the feed-forward.

Query, key and value share one matrix product, as do gate and input of the feed-forward: at one row,
what counts is how few operations there are and how few times memory is walked.

Sources: SwiGLU arXiv 2002.05202; norms of queries and keys arXiv 2302.05442, section 3.1.

Shapes: T tokens, E hidden_size, H query heads, KV key heads, D head_dim; leading axes are free.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from .adapt import Adapt, project
from .attention import Attend
from .layers import Linear, RmsNorm, Rotation, rotate

__all__ = ["Attention", "Mlp"]


class Attention(nn.Module):
    """Projections around attention; where keys and values are kept is `attend`'s business."""

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        fused = config.q_size + 2 * config.kv_size
        self.qkv_proj = Linear(config.hidden_size, fused, bias=config.attention_bias)
        self.q_norm, self.k_norm = _qk_norms(config)
        self.o_proj = Linear(config.q_size, config.hidden_size, bias=config.attention_output_bias)

    def forward(
        self, x: Tensor, rotation: Rotation | None, attend: Attend, adapt: Adapt | None = None
    ) -> Tensor:
        """[..., T, E] → [..., T, E]."""
        qkv = project(self.qkv_proj, x, adapt, self.layer_index, "qkv_proj")
        qkv = qkv.view(*x.shape[:-1], -1, self.head_dim)  # [..., T, H + 2 KV, D]
        num_rotated = self.num_heads + self.num_kv_heads
        qk, v = torch.split(qkv, [num_rotated, self.num_kv_heads], dim=-2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = torch.split(qk, [self.num_heads, self.num_kv_heads], dim=-2)
            qk = torch.cat((_normalize(q, self.q_norm), _normalize(k, self.k_norm)), dim=-2)
        if rotation is not None:
            qk = rotate(qk, rotation)
        q, k = torch.split(qk, [self.num_heads, self.num_kv_heads], dim=-2)
        out = attend(self.layer_index, q, k, v)  # [..., T, H, D]
        return project(self.o_proj, out.flatten(-2), adapt, self.layer_index, "o_proj")


class Mlp(nn.Module):
    """Feed-forward: one hidden layer behind a gate, or with GELU."""

    def __init__(self, config: ModelConfig, layer_index: int, inner: int | None = None) -> None:
        """Take `inner` as the width inside; None: the model's."""
        super().__init__()
        self.layer_index = layer_index
        width, bias = config.hidden_size, config.mlp_bias
        inner = config.intermediate_size if inner is None else inner
        self.activation = config.activation
        if config.is_gated:
            self.gate_up_proj = Linear(width, 2 * inner, bias=bias)
        else:
            self.up_proj = Linear(width, inner, bias=bias)
        self.down_proj = Linear(inner, width, bias=bias)

    def forward(self, x: Tensor, adapt: Adapt | None = None) -> Tensor:
        """[..., E] → [..., E]."""
        if self.activation in ("swiglu", "geglu_tanh"):
            both = project(self.gate_up_proj, x, adapt, self.layer_index, "gate_up_proj")
            gate, up = both.chunk(2, dim=-1)
            is_silu = self.activation == "swiglu"
            inner = (F.silu(gate) if is_silu else F.gelu(gate, approximate="tanh")) * up
        else:
            approximate = "tanh" if self.activation == "gelu_tanh" else "none"
            inner = project(self.up_proj, x, adapt, self.layer_index, "up_proj")
            inner = F.gelu(inner, approximate=approximate)
        return project(self.down_proj, inner, adapt, self.layer_index, "down_proj")


def _qk_norms(config: ModelConfig) -> tuple[RmsNorm | None, RmsNorm | None]:
    if config.qk_norm == "none":
        return None, None
    is_full = config.qk_norm == "full"
    widths = (config.q_size, config.kv_size) if is_full else (config.head_dim, config.head_dim)
    query, key = (RmsNorm(width, config.norm_eps, config.norm_weight_offset) for width in widths)
    return query, key


def _normalize(heads: Tensor, norm: RmsNorm) -> Tensor:
    """[..., heads, D] → the same shape: head by head, or all together, as wide as the norm is."""
    rows = heads.reshape(*heads.shape[:-2], -1, len(norm.weight))
    return norm(rows).view(heads.shape)  # type: ignore[no-any-return]
