"""Norms of rows, in float64, and the bound of the kernels' error.

Sources: root mean square, arXiv 1910.07467; layer norm, arXiv 1607.06450. U = 2**-24.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..program import Norm

__all__ = ["norm_error", "norm_rows"]

Floats = npt.NDArray[np.float64]

_U = 2.0**-24
_LANES = 64
"""Sums that the kernels add up side by side before they are joined."""


def norm_rows(x: npt.NDArray[np.float32], norm: Norm) -> Floats:
    """x [T, width] normalized; of kind 2 by mean and variance, else by the root mean square."""
    wide = x.astype(np.float64)
    off = wide - wide.mean(axis=1, keepdims=True) if norm.kind == 2 else wide
    scale = 1.0 / np.sqrt((off**2).mean(axis=1, keepdims=True) + norm.eps)
    width = x.shape[1]
    rows: Floats = off * scale * norm.weight[:width]
    return rows if norm.bias is None else rows + norm.bias[:width]


def norm_error(x: npt.NDArray[np.float32], norm: Norm) -> Floats:
    """Largest error of the kernels against `norm_rows`, for each number.

    A sum of n terms in 64 lanes errs by (n / 64 + 7) * U of the sum of magnitudes. The root halves
    it; a division, a sum, a root, an inverse and two products add at most 10 * U. The mean's own
    error moves all numbers of a row alike, and the variance by its square.
    """
    wide, width = x.astype(np.float64), x.shape[1]
    steps = width / _LANES + 7
    result = norm_rows(x, norm)
    bias = 0.0 if norm.bias is None else norm.bias[:width]
    relative, moved = (steps / 2 + 10) * _U, np.zeros((len(x), 1))
    if norm.kind == 2:
        off = wide - wide.mean(axis=1, keepdims=True)
        scale = 1.0 / np.sqrt((off**2).mean(axis=1, keepdims=True) + norm.eps)
        moved = (steps + 1) * _U * np.abs(wide).mean(axis=1, keepdims=True) * scale
    error: Floats = np.abs(result - bias) * (relative + moved**2)
    return error + moved * np.abs(norm.weight[:width]) + _U * np.abs(result)
