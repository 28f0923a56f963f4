"""Mixtures of experts: which experts a token goes through, and the sum of their outputs.

Source: Mixtral, arXiv 2401.04088, section 2.1; the shared expert, arXiv 2401.06066.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...quant.dtypes import Float32Array

__all__ = ["combine", "route"]

Floats = npt.NDArray[np.float64]


def route(
    logits: Float32Array, num_chosen: int, *, is_normalized: bool
) -> tuple[npt.NDArray[np.int64], Floats]:
    """Experts of each token, ascending, and their weights, both [T, num_chosen].

    The likeliest, of equals the lowest; weights are their probabilities among all experts, divided
    by their sum if `is_normalized`. The kernels' weights are within 2e-6 of these, relatively.
    """
    wide = logits.astype(np.float64)
    shares = np.exp(wide - wide.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    chosen = np.sort(np.argsort(-wide, axis=1, kind="stable")[:, :num_chosen], axis=1)
    weights: Floats = np.take_along_axis(shares, chosen, axis=1)
    if is_normalized:
        weights = weights / weights.sum(axis=1, keepdims=True)
    return chosen, weights


def combine(outputs: Floats, weights: Floats) -> Floats:
    """Outputs [T, num_chosen, E] of each token's experts, weighted [T, num_chosen] and summed."""
    total: Floats = (outputs * weights[:, :, None]).sum(axis=1)
    return total
