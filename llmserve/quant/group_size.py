"""The group size of a layer: a divisor of its width, so that nothing on disk is padding.

Asked for groups of 32, a layer 172 wide can have 4 or 43. The larger costs fewer scales. It is
taken unless its squared error exceeds by a quarter what groups of exactly the asked size (the last
one short) would have had, and the smaller does not spend more bits on scales than on integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from ..errors import ConfigError
from .dtypes import NUMPY_DTYPES, Float32Array
from .groups import Bits, quantize_rtn

__all__ = ["choose_group_size", "divisors_around", "squared_error"]

_TOLERATED = 1.25  # squared error, relative to groups of the size that was asked for


def choose_group_size(
    width: int,
    asked: int,
    weights: Callable[[], Iterable[Float32Array]],
    bits: Bits,
    *,
    scale_dtype: str = "float32",
) -> int:
    """The group size for layers of one width: `asked` if it divides it, else chosen by error.

    Layers of one width share it, because other programs join some of them (query, key and value)
    and can do so with equal group sizes only.

    Args:
        width: input width of the layers.
        asked: weights per group that are wanted; a larger one than the width means the width.
        weights: gives the layers [out, width] one after another; may be called twice.
        bits: 8 or 4.
        scale_dtype: type of the stored scales.

    Raises `ConfigError` for a size below 1.
    """
    finer, coarser = divisors_around(width, asked)
    scale_bits = 8 * NUMPY_DTYPES[scale_dtype].itemsize
    if finer == coarser or scale_bits > bits * finer:
        return coarser

    def error(size: int) -> float:
        return sum(
            squared_error(weight, bits, size, scale_dtype=scale_dtype) for weight in weights()
        )

    return coarser if error(coarser) <= _TOLERATED * error(asked) else finer


def divisors_around(width: int, asked: int) -> tuple[int, int]:
    """The largest divisor of `width` not above `asked`, and the smallest one not below it.

    Where `asked` exceeds the width, both are the width.
    """
    if asked < 1:
        raise ConfigError(f"a group has at least 1 weight, not {asked}")
    divisors = [size for size in range(1, width + 1) if width % size == 0]
    finer = max(size for size in divisors if size <= asked)
    coarser = min((size for size in divisors if size >= asked), default=width)
    return finer, coarser


def squared_error(
    weight: Float32Array, bits: Bits, size: int, *, scale_dtype: str = "float32"
) -> float:
    """Sum of squared errors of groups of `size`, the last one of a row short if it must be."""
    width = weight.shape[1]
    whole = width - width % size
    total = 0.0
    for part, part_size in ((weight[:, :whole], size), (weight[:, whole:], width - whole)):
        if part.shape[1]:
            part = np.ascontiguousarray(part)
            rounded = quantize_rtn(part, bits, part_size, scale_dtype=scale_dtype)
            total += float(np.square(part - rounded.dequantize(), dtype=np.float64).sum())
    return total
