"""Rows of activations as int8, one scale for each group of inputs. The bits are the contract."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...quant.dtypes import Float32Array

__all__ = ["QuantizedRows", "group_slices", "quantize_rows"]

_SMALLEST = np.float32(1e-30)
"""A group whose largest magnitude is no larger counts as zeros."""


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedRows:
    """T rows in G groups."""

    integers: npt.NDArray[np.int8]  # [T, width]
    scales: Float32Array  # [T, G]

    def dequantize(self, group_size: int) -> Float32Array:
        """Integer times scale, [T, width]."""
        width = self.integers.shape[1]
        wide = np.repeat(self.scales, group_size, axis=1)[:, :width]
        return self.integers.astype(np.float32) * wide


def group_slices(width: int, group_size: int) -> list[slice]:
    """The inputs of each group; the last may be shorter."""
    return [slice(start, min(start + group_size, width)) for start in range(0, width, group_size)]


def quantize_rows(x: Float32Array, group_size: int) -> QuantizedRows:
    """Rows [T, width] rounded to the nearest integers, ties to even, of each group.

    The scale is the group's largest magnitude divided by 127, and

        |x - integer * scale| <= scale * (1 / 2 + 127 * 4 * 2**-24)

    A row that holds NaN or an infinity has NaN for all its scales; its integers mean nothing.
    """
    groups = group_slices(x.shape[1], group_size)
    integers = np.zeros(x.shape, np.int8)
    scales = np.zeros((len(x), len(groups)), np.float32)
    is_finite = np.logical_and.reduce(np.isfinite(x), axis=1)
    known = np.where(is_finite[:, None], x, np.float32(0.0))
    for index, inputs in enumerate(groups):
        largest = np.abs(known[:, inputs]).max(axis=1)
        is_zero = largest <= _SMALLEST
        inverse = np.float32(127.0) / np.where(is_zero, np.float32(np.inf), largest)
        integers[:, inputs] = np.rint(known[:, inputs] * inverse[:, None])
        scales[:, index] = np.where(is_zero, np.float32(0.0), largest / np.float32(127.0))
    scales[~is_finite] = np.nan
    return QuantizedRows(integers, scales)
