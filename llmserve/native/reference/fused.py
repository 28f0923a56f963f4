"""The fused multiply-add of float32, to the bit: numpy has none.

Source: Boldo and Melquiond 2008, "Emulation of a FMA and correctly rounded sums", theorem 1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...quant.dtypes import Float32Array

__all__ = ["fma"]


def fma(a: Float32Array, b: Float32Array, c: Float32Array) -> Float32Array:
    """a * b + c, rounded once; arrays that broadcast.

    The product is exact in float64. The sum is rounded to odd (its last bit is set where it is not
    exact), so that the second rounding, to float32, decides as if it were the only one.
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    rounded: Float32Array = _to_odd(total, error).astype(np.float32)
    return rounded


def _to_odd(
    total: npt.NDArray[np.float64], error: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    bits = total.view(np.int64)
    is_even = (bits & 1) == 0
    is_inexact = (error != 0) & np.isfinite(total)
    outward = np.where(np.signbit(total) == np.signbit(error), 1, -1)
    return (bits + np.where(is_inexact & is_even, outward, 0)).view(np.float64)
