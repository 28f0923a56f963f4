"""A rank's part of a model made one with the others': where sums go, and what is shared.

The model is an ordinary `Transformer` of the rank's sizes. Behind each half block the ranks'
outputs are added up; what adapters add to a last product is part of that sum. Three modules need
more than the rank has, and ask for it: the embedding, norms over all heads, and routers, which must
decide alike everywhere.

Shapes: T tokens, E hidden_size, R rows of logits, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.experts import MixtureOfExperts
from ..model.layers import Embedding, RmsNorm
from ..model.transformer import Block, Transformer
from .protocol import Batch
from .torch_cache import PagedCache
from .torch_collectives import Collectives
from .torch_forward import Forward

__all__ = ["RankForward", "join_model"]


def join_model(model: Transformer, group: Collectives) -> None:
    """Have a loaded part of a model compute together with the others of `group`."""
    model.add_module("embed_tokens", _DealtEmbedding(model.embed_tokens, group))
    for block in cast("Iterable[Block]", model.layers):
        attention, mlp = block.self_attn, block.mlp
        _add_up(attention, group)
        _add_up(mlp, group)
        if isinstance(mlp, MixtureOfExperts):
            mlp.gate.register_forward_hook(lambda _, __, logits: group.from_first(logits))
        if model.config.qk_norm == "full":
            for name in ("q_norm", "k_norm"):
                setattr(attention, name, _DealtNorm(getattr(attention, name), group))


class RankForward:
    """`Forward` of one rank: all ranks call it alike, and rank 0 has the logits."""

    def __init__(self, own: Forward, group: Collectives, vocab_size: int) -> None:
        """Compute the rank's part by `own`; `vocab_size` is the whole model's."""
        self._own, self._group, self._vocab_size = own, group, vocab_size

    def hidden(self, batch: Batch, cache: PagedCache, fed: Tensor | None = None) -> Tensor:
        """See `Forward`. The same on all ranks."""
        return self._own.hidden(batch, cache, fed)

    def logits(self, hidden: Tensor) -> Tensor:
        """Rows [R, E] of rank 0 → float32 [R, V] there, and the rank's own columns elsewhere.

        Other ranks give a tensor of that shape and type.
        """
        part = self._own.logits(self._group.from_first(hidden))
        return self._group.joined(part)[:, : self._vocab_size]

    def check(self) -> None:
        """See `Forward`."""
        self._own.check()


def _add_up(half: nn.Module, group: Collectives) -> None:
    """Have a half block return the sum of what it makes on every rank."""
    half.register_forward_hook(lambda _, __, out: group.sum(out))


class _DealtEmbedding(nn.Module):
    """The embedding of which each rank has the rows of some ids: every id has one that knows it."""

    def __init__(self, own: Embedding, group: Collectives) -> None:
        super().__init__()
        self.weight = own.weight
        self._group = group
        self._first = group.rank.index * len(own.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """[T] ids → [T, E]."""
        places = ids - self._first
        is_other = (places < 0) | (places >= len(self.weight))
        rows = F.embedding(places.masked_fill(is_other, 0), self.weight)
        return self._group.sum(rows.masked_fill(is_other[..., None], 0.0))


class _DealtNorm(nn.Module):
    """RMSNorm over all heads together, of which each rank has some; in float32."""

    def __init__(self, own: RmsNorm, group: Collectives) -> None:
        super().__init__()
        self.weight = own.weight
        self._eps, self._offset = own.eps, own.offset
        self._group = group

    def forward(self, x: Tensor) -> Tensor:
        """[..., the rank's heads] → the same shape.

        Where several ranks have the same key head, each head counts equally often.
        """
        rows = x.float()
        mean = self._group.sum(rows.pow(2).mean(-1, keepdim=True)) / self._group.rank.count
        normalized = rows * torch.rsqrt(mean + self._eps)
        return (normalized * (self.weight.float() + self._offset)).to(x.dtype)
