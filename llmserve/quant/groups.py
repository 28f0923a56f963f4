"""Linear layers as small integers with one scale per group of inputs: round to nearest.

A weight becomes `integer * scale`; no zero point. int8 takes -127..127 (no -128: AVX2's pairwise
sums of int16 would saturate), int4 takes -8..7, the whole range of the packed format.

The scale of an int8 group is its largest magnitude divided by 127. The scale of an int4 group is
the smallest that leaves no weight more than half a step outside -8..7: the larger of its maximum
divided by 7.5 and of its minimum divided by -8.5. (Against the largest magnitude divided by 7, the
squared error is 10 to 25 % smaller on every layer of a real model.) A scale is stored in the
model's own type, rounded up. So for every weight, in exact arithmetic,

    |weight - integer * scale| <= scale / 2

and the float32 product adds at most 2**-24 of itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, ExportError
from .dtypes import Float32Array, StoredArray, from_float32, to_float32

__all__ = [
    "INTEGER_RANGE",
    "QuantizedLinear",
    "divisors_around",
    "quantize_rtn",
    "squared_error",
]

Bits = Literal[4, 8]

INTEGER_RANGE: dict[int, tuple[int, int]] = {4: (-8, 7), 8: (-127, 127)}
"""Bits → smallest and largest integer that is written."""

_LARGEST = {"float32": 3.4028234663852886e38, "bfloat16": 3.3895313892515355e38, "float16": 65504.0}
_CHUNK = 1 << 20  # weights quantized at once: bounds the float64 working copies to some 50 MB


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedLinear:
    """The weight of one linear layer: out x in integers and their scales."""

    bits: Bits
    group_size: int | None
    """Inputs that share a scale; None: one scale per output row."""
    values: npt.NDArray[np.int8]  # [out, in]
    scales: Float32Array  # [out, groups], each a number of `scale_dtype`
    scale_dtype: str = "float32"
    """Type of the scales on disk: the model's own."""

    def __post_init__(self) -> None:
        out, width = self.values.shape
        size = self.group_size or width
        if width % size or self.scales.shape != (out, width // size):
            raise ValueError(
                f"scales of shape {self.scales.shape} do not fit values of shape "
                f"{self.values.shape} in groups of {size}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Output and input width."""
        out, width = self.values.shape
        return out, width

    def dequantize(self) -> Float32Array:
        """The weight as float32, [out, in]: integer times scale, one rounding each."""
        out, groups = self.scales.shape
        grouped = self.values.reshape(out, groups, -1).astype(np.float32)
        grouped *= self.scales[:, :, None]
        return grouped.reshape(self.values.shape)


def quantize_rtn(
    weight: Float32Array,
    bits: Bits,
    group_size: int | None,
    *,
    scale_dtype: str = "float32",
    name: str = "weight",
) -> QuantizedLinear:
    """Round a weight [out, in] to the nearest integers of its groups. Deterministic.

    Args:
        weight: what to quantize; finite.
        bits: 8 or 4.
        group_size: inputs per scale, a divisor of `in`; None: one scale per output row.
        scale_dtype: type of the stored scales (`FLOAT_DTYPES`).
        name: the layer's, for messages.

    Raises:
        ConfigError: a group size that does not divide the width, bits other than 4 and 8.
        ExportError: NaN, an infinity or a number beyond `scale_dtype` in the weight.
    """
    if bits not in INTEGER_RANGE:
        raise ConfigError(f"weights are quantized to 4 or 8 bits, not {bits!r}")
    out, width = weight.shape
    size = width if group_size is None else group_size
    if size < 1 or width % size:
        raise ConfigError(f"{name}: group size {size} does not divide the width {width}")
    values = np.empty((out, width), np.int8)
    scales = np.empty((out, width // size), np.float32)
    for rows in _row_chunks(out, width):
        _check_finite(weight[rows], scale_dtype, name)
        groups = weight[rows].reshape(-1, width // size, size).astype(np.float64)
        scales[rows], integers = _round_groups(groups, bits, scale_dtype)
        values[rows] = integers.reshape(-1, width)
    return QuantizedLinear(bits, group_size, values, scales, scale_dtype)


def squared_error(weight: Float32Array, bits: Bits, size: int, *, scale_dtype: str) -> float:
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


def divisors_around(width: int, asked: int) -> tuple[int, int]:
    """The largest divisor of `width` not above `asked`, and the smallest one not below it."""
    if asked < 1:
        raise ConfigError(f"a group has at least 1 weight, not {asked}")
    divisors = [size for size in range(1, width + 1) if width % size == 0]
    finer = max(size for size in divisors if size <= asked)
    coarser = min((size for size in divisors if size >= asked), default=width)
    return finer, coarser


def _row_chunks(out: int, width: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, width))
    for start in range(0, out, step):
        yield slice(start, min(out, start + step))


def _check_finite(weight: Float32Array, dtype: str, name: str) -> None:
    if not np.isfinite(weight).all():
        raise ExportError(f"{name} holds NaN or an infinity; it cannot be quantized")
    if np.abs(weight).max(initial=0.0) > _LARGEST[dtype]:
        raise ExportError(f"{name} holds a weight beyond the range of {dtype}")


def _round_groups(
    groups: npt.NDArray[np.float64], bits: Bits, scale_dtype: str
) -> tuple[Float32Array, npt.NDArray[np.int8]]:
    """Scales [rows, groups] and integers [rows, groups, size] of float64 weights."""
    low, high = INTEGER_RANGE[bits]
    wanted = np.abs(groups).max(axis=2) / (high if bits == 8 else high + 0.5)
    lows = np.full_like(wanted, low)
    if bits == 4:
        smallest = np.maximum(groups.max(axis=2) / (high + 0.5), groups.min(axis=2) / (low - 0.5))
        # Near the end of the type's range, -8 times the scale would overflow: -7..7 is used there.
        overflows = -low * smallest > 0.9 * _LARGEST[scale_dtype]
        wanted = np.where(overflows, wanted, smallest)
        lows[overflows] = -high
    scales = _stored_scales(wanted, high, scale_dtype)
    steps = np.where(scales > 0, scales, 1).astype(np.float64)  # a group of zeros has scale 0
    integers = np.clip(np.rint(groups / steps[:, :, None]), lows[:, :, None], high)
    return scales, integers.astype(np.int8)


def _stored_scales(wanted: npt.NDArray[np.float64], high: int, dtype: str) -> Float32Array:
    """The smallest number of `dtype` that is at least `wanted`.

    The one below it where `high` times that would overflow: the largest weight is still within
    half a step of the range.
    """
    nearest = from_float32(wanted.astype(np.float32), dtype)
    # Scales are not negative: the next number of the type has the next integer as its bits.
    codes = nearest.data.view(np.uint32 if dtype == "float32" else np.uint16)
    codes = codes + (to_float32(nearest) < wanted).astype(codes.dtype)
    scales = to_float32(StoredArray(dtype, codes.view(nearest.data.dtype)))
    codes = codes - (scales.astype(np.float64) * high > _LARGEST[dtype]).astype(codes.dtype)
    return to_float32(StoredArray(dtype, codes.view(nearest.data.dtype)))
