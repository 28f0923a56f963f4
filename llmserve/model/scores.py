"""From products of queries and keys to what is attended to: scale, cap, softmax.

Most models leave all of it to torch's fused kernel. A cap on the scores (Gemma 2, arXiv 2408.00118,
section 2) has none on CPUs, so it is written out.

Shapes: B batch, H query heads, KV key heads, G = H / KV, N queries, L places read, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import ModelConfig

__all__ = ["Scores", "soft_cap"]


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap · tanh(x / cap): x where it is small, within ±cap where it is not."""
    return (x / cap).tanh() * cap


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """How a model weighs what it attends to."""

    scale: float | None = None
    """Factor of the products; None: 1 / sqrt(D)."""
    cap: float | None = None
    """Soft cap of the scaled products; None: they have none."""

    @classmethod
    def of(cls, config: ModelConfig) -> Scores:
        """Those of a model."""
        return cls(scale=config.attention_scale, cap=config.attention_softcap)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """q [B, H, N, D] over k and v [B, KV, L, D] → [B, H, N, D].

        Args:
            q: Queries.
            k: Keys; each of their heads serves H / KV query heads.
            v: Values.
            mask: Broadcast to [B, H, N, L]: true where seen, or a number added to the score.
            is_causal: Query n sees places 0..n; without a mask.
        """
        if self.cap is not None:
            return self._attend_capped(q, k, v, mask, is_causal, self.cap)
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=is_causal,
            scale=self.scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )

    def _attend_capped(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, cap: float
    ) -> Tensor:
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        grouped = q.reshape(len(q), k.shape[1], -1, *q.shape[2:])  # [B, KV, G, N, D]
        scores = soft_cap(grouped @ k.unsqueeze(2).mT * scale, cap)  # [B, KV, G, N, L]
        if is_causal:
            mask = scores.new_ones(scores.shape[-2:]).tril().bool()
        if mask is not None:
            if mask.ndim > 2:
                mask = mask.unsqueeze(2)
            is_flag = not mask.is_floating_point()
            scores = scores.masked_fill(~mask, float("-inf")) if is_flag else scores + mask
        weights = scores.softmax(-1, dtype=torch.float32)
        return (weights.to(v.dtype) @ v.unsqueeze(2)).flatten(1, 2)
