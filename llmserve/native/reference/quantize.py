"""Rows of activations as integers, a scale for each group of inputs. The bits are the contract."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...quant.dtypes import Float32Array

__all__ = ["DIGIT_BASE", "QuantizedRows", "group_slices", "quantize_rows"]

DIGIT_BASE = 254
"""An integer of two digits, -127..127 each, is high * 254 + low."""
_LARGEST = {1: np.float32(127.0), 2: np.float32(127.0 * DIGIT_BASE + 126.0)}
"""By digits. One more would have 127.5 for its high digit, which rounds to the even 128."""
_SMALLEST = np.float32(1e-30)
"""A group whose largest magnitude is no larger counts as zeros."""


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedRows:
    """T rows in G groups."""

    digits: tuple[npt.NDArray[np.int8], ...]  # [T, width] each: one, or the high and the low ones
    scales: Float32Array  # [T, G]

    @property
    def integers(self) -> npt.NDArray[np.int32]:
        """What the digits stand for, [T, width]."""
        total = np.zeros(self.digits[0].shape, np.int32)
        for digit in self.digits:
            total = total * DIGIT_BASE + digit
        return total

    def dequantize(self, group_size: int) -> Float32Array:
        """Integer times scale, [T, width]."""
        width = self.digits[0].shape[1]
        wide = np.repeat(self.scales, group_size, axis=1)[:, :width]
        return self.integers.astype(np.float32) * wide


def group_slices(width: int, group_size: int) -> list[slice]:
    """The inputs of each group; the last may be shorter."""
    return [slice(start, min(start + group_size, width)) for start in range(0, width, group_size)]


def quantize_rows(x: Float32Array, group_size: int, num_digits: int = 1) -> QuantizedRows:
    """Rows [T, width] rounded to the nearest integers, ties to even, of each group.

    The scale is the group's largest magnitude divided by the largest integer M of so many digits
    (127 or 32384), and

        |x - integer * scale| <= scale * (1 / 2 + M * 4 * 2**-24)

    A row that holds NaN or an infinity has NaN for all its scales; its integers mean nothing.
    """
    groups = group_slices(x.shape[1], group_size)
    largest_integer = _LARGEST[num_digits]
    integers = np.zeros(x.shape, np.float32)
    scales = np.zeros((len(x), len(groups)), np.float32)
    is_finite = np.logical_and.reduce(np.isfinite(x), axis=1)
    known = np.where(is_finite[:, None], x, np.float32(0.0))
    for index, inputs in enumerate(groups):
        largest = np.abs(known[:, inputs]).max(axis=1)
        is_zero = largest <= _SMALLEST
        inverse = largest_integer / np.where(is_zero, np.float32(np.inf), largest)
        integers[:, inputs] = np.rint(known[:, inputs] * inverse[:, None])
        scales[:, index] = np.where(is_zero, np.float32(0.0), largest / largest_integer)
    scales[~is_finite] = np.nan
    return QuantizedRows(_digits(integers, num_digits), scales)


def _digits(integers: Float32Array, num_digits: int) -> tuple[npt.NDArray[np.int8], ...]:
    """The higher digit is the nearest multiple of the base, so that the lower one is a byte too."""
    if num_digits == 1:
        return (integers.astype(np.int8),)
    high = np.rint(integers * np.float32(1.0 / DIGIT_BASE))
    return high.astype(np.int8), (integers - high * DIGIT_BASE).astype(np.int8)
