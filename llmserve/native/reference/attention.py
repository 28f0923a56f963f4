"""Attention of one sequence over its stored keys and values, in float64, and the kernels' bound.

C tokens of context, T queries at its end, H query heads, KV key heads, D head size. U = 2**-24.
Source: arXiv 1706.03762; shared key heads, arXiv 2305.13245; windows, arXiv 2310.06825.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...quant.dtypes import Float32Array

__all__ = ["Attention", "attend"]

Floats = npt.NDArray[np.float64]

_U = 2.0**-24
_CAP_ERROR = 4e-7


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """How scores are made."""

    scale: float
    cap: float = 0.0
    """Above 0, a score is cap * tanh(score / cap)."""
    window: int = 0
    """Tokens that a query sees, its own included; 0: all up to itself."""


def attend(
    queries: Float32Array, keys: Float32Array, values: Float32Array, rules: Attention
) -> tuple[Floats, Floats]:
    """Outputs [T, H, D] of queries [T, H, D] over keys and values [C, KV, D], and their error.

    The error is the largest of the kernels. A score errs by (D + 4) * U of the sum of |q k|, scaled
    (and by 4e-7 of a cap); a weight by twice that, 8 * U for exponentials, and U for each of the
    tokens summed; an output by that share of the weighted sum of |values|.
    """
    num_queries, num_heads, width = queries.shape
    group = num_heads // keys.shape[1]
    q, k, v = (x.astype(np.float64) for x in (queries, keys, values))
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("thd,chd->htc", q, k) * rules.scale
    error = np.einsum("thd,chd->htc", abs(q), abs(k)) * abs(rules.scale) * (width + 4) * _U
    if rules.cap > 0:
        scores = rules.cap * np.tanh(scores / rules.cap)
        error += rules.cap * _CAP_ERROR
    seen = _seen(num_queries, len(keys), rules.window)
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    worst = np.where(seen, error, 0.0).max(axis=-1)  # [H, T]
    share = 2 * np.expm1(2 * worst) + (len(keys) + 24) * _U
    out = np.einsum("htc,chd->thd", weights, v)
    return out, np.einsum("htc,chd->thd", weights, abs(v)) * share.T[:, :, None]


def _seen(num_queries: int, num_keys: int, window: int) -> npt.NDArray[np.bool_]:
    """Which tokens each query sees, [T, C]."""
    position = np.arange(num_keys - num_queries, num_keys)[:, None]
    token = np.arange(num_keys)[None, :]
    seen: npt.NDArray[np.bool_] = token <= position
    return seen & (token > position - window) if window else seen
