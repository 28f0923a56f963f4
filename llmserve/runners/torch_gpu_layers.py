"""Blocks of a GPU's model, whose elementwise operations are joined in Triton kernels.

They hold the layers of the model's own blocks under the same names, so weights, adapters and layers
that keep integers are none of their business. From block to block goes, in place of a tensor, the
residual stream with what the last half of a block adds still apart (`Pending`): one kernel adds it
and makes the next norm of the sum.

Shapes: T tokens in the step, E hidden_size, D head_dim.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import ConfigError
from ..layouts import block_norms
from ..model.adapt import Adapt, project
from ..model.experts import MixtureOfExperts
from ..model.half_blocks import Attention, Mlp
from ..model.layers import RmsNorm, Rotation
from ..model.transformer import Block, Transformer
from ..weight_source import WeightSource
from .torch_integer_layers import keep_integers
from .torch_triton_attention import MOST_HEAD_DIM
from .torch_triton_elementwise import Norm, add_and_normalize, gate, normalize_rows
from .torch_triton_heads import HeadNorms

__all__ = [
    "JoinedAttention",
    "JoinedBlock",
    "JoinedMlp",
    "JoinedNorm",
    "KeepAndAttend",
    "Pending",
    "join_operations",
    "use_kernels",
]


class KeepAndAttend(Protocol):
    """`Attend` that also normalizes and turns the heads on their way."""

    def __call__(
        self, layer_index: int, q: Tensor, k: Tensor, v: Tensor,
        rotation: Rotation | None = None, norms: HeadNorms | None = None,
    ) -> Tensor:  # fmt: skip
        """q [T, H, D] with new keys and values [T, KV, D] → [T, H, D]."""


class Pending(NamedTuple):
    """The residual stream between two halves."""

    stream: Tensor  # [T, E]
    added: Tensor | None = None  # [T, E] still to be put onto it
    after: Norm | None = None  # the norm that `added` passes first


class JoinedNorm(RmsNorm):
    """The final norm, with the last sum of the stream."""

    def __init__(self, norm: RmsNorm) -> None:
        super().__init__(len(norm.weight), norm.eps, norm.offset)
        self.weight = norm.weight

    def forward(self, x: Tensor | Pending) -> Tensor:
        """[T, E] → [T, E]."""
        return _join(x, _norm(self))[1]


class JoinedMlp(nn.Module):
    """A gated feed-forward."""

    def __init__(self, mlp: Mlp) -> None:
        super().__init__()
        self.layer_index = mlp.layer_index
        self.gate_up_proj, self.down_proj = mlp.gate_up_proj, mlp.down_proj
        self.is_silu = mlp.activation == "swiglu"

    def forward(self, x: Tensor, adapt: Adapt | None = None) -> Tensor:
        """[T, E] → [T, E]."""
        both = project(self.gate_up_proj, x, adapt, self.layer_index, "gate_up_proj")
        inner = gate(both, is_silu=self.is_silu)
        return project(self.down_proj, inner, adapt, self.layer_index, "down_proj")


class JoinedAttention(nn.Module):
    """Projections around attention; norms of heads, rotation and cache write are one kernel's."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.layer_index, self.head_dim = attention.layer_index, attention.head_dim
        self.num_heads, self.num_kv_heads = attention.num_heads, attention.num_kv_heads
        self.qkv_proj, self.o_proj = attention.qkv_proj, attention.o_proj
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm

    def forward(
        self, x: Tensor, rotation: Rotation | None, attend: KeepAndAttend,
        adapt: Adapt | None = None,
    ) -> Tensor:  # fmt: skip
        """[T, E] → [T, E]."""
        qkv = project(self.qkv_proj, x, adapt, self.layer_index, "qkv_proj")
        kv_size = self.num_kv_heads * self.head_dim
        sizes = [self.num_heads * self.head_dim, kv_size, kv_size]
        q, k, v = torch.split(qkv, sizes, dim=-1)
        q, query_norm = self._normed(q, self.q_norm)
        k, key_norm = self._normed(k, self.k_norm)
        q, k, v = (heads.view(len(x), -1, self.head_dim) for heads in (q, k, v))
        norms = HeadNorms(query_norm, key_norm)
        out = attend(self.layer_index, q, k, v, rotation, norms)  # [T, H, D]
        return project(self.o_proj, out.flatten(-2), adapt, self.layer_index, "o_proj")

    def _normed(self, heads: Tensor, norm: nn.Module | None) -> tuple[Tensor, Norm | None]:
        """Heads [T, any] normalized together, or as they are and the norm of each head."""
        if norm is None:
            return heads, None
        if not isinstance(norm, RmsNorm):  # of heads that other ranks have, too
            return norm(heads), None
        if len(norm.weight) == self.head_dim:
            return heads, _norm(norm)
        return normalize_rows(heads, _norm(norm)), None


class JoinedBlock(nn.Module):
    """Attention and feed-forward with their norms; the sum with the stream is the next one's."""

    self_attn: nn.Module
    mlp: nn.Module

    def __init__(self, block: Block, config: ModelConfig) -> None:
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        self._norms = block_norms(config)

    def forward(
        self, x: Tensor | Pending, rotation: Rotation | None, attend: KeepAndAttend,
        adapt: Adapt | None = None,
    ) -> Pending:  # fmt: skip
        """[T, E] → [T, E], its last sum pending."""
        names = self._norms
        stream, inner = _join(x, self._norm_named(names.before_attention))
        out = self.self_attn(inner, rotation, attend, adapt)
        between = Pending(stream, out, self._norm_named(names.after_attention))
        stream, inner = _join(between, self._norm_named(names.before_mlp))
        has_experts = isinstance(self.mlp, MixtureOfExperts)
        out = self.mlp(inner) if has_experts else self.mlp(inner, adapt)
        return Pending(stream, out, self._norm_named(names.after_mlp))

    def _norm_named(self, name: str | None) -> Norm | None:
        return None if name is None else _norm(getattr(self, name))


def use_kernels(
    model: Transformer, checkpoint: WeightSource, device: torch.device, dtype: torch.dtype
) -> None:
    """Put layers that kernels compute in place of the model's, before weights are loaded.

    Raises:
        ConfigError: heads too wide for the attention kernel.
        CheckpointError: a quantized layer is malformed.
    """
    head_dim = model.config.head_dim
    if head_dim > MOST_HEAD_DIM:
        raise ConfigError(
            f"on a GPU heads have at most {MOST_HEAD_DIM} values, the model's have {head_dim}: "
            "use --device cpu"
        )
    join_operations(model)
    if checkpoint.quantization is not None:
        keep_integers(model, checkpoint, device, dtype)


def join_operations(model: Transformer) -> None:
    """Put joined layers in place of the model's, where kernels know their form.

    Gated feed-forwards and attention are taken in every model, blocks where norms are RMSNorm.
    """
    for name, module in list(model.named_modules()):
        if type(module) is Attention:
            model.set_submodule(name, JoinedAttention(module))
        elif type(module) is Mlp and model.config.is_gated:
            model.set_submodule(name, JoinedMlp(module))
    if isinstance(model.norm, RmsNorm):
        model.layers = nn.ModuleList(
            JoinedBlock(block, model.config) for block in model.layers if isinstance(block, Block)
        )
        model.norm = JoinedNorm(model.norm)


def _norm(norm: RmsNorm) -> Norm:
    return Norm(norm.weight, norm.eps, norm.offset)


def _join(x: Tensor | Pending, before: Norm | None) -> tuple[Tensor, Tensor]:
    """The stream, and what is read of it."""
    stream, added, after = x if isinstance(x, Pending) else Pending(x)
    return add_and_normalize(stream, added, after=after, before=before)
