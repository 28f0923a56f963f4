"""Linear layers as small integers with one scale per group of inputs: round to nearest.

A weight becomes `integer * scale`; no zero point. int8 takes -127..127 (no -128: AVX2's pairwise
sums of int16 would saturate), int4 takes -8..7, the whole range of the packed format.

The scale of an int8 group is its largest magnitude divided by 127. An int4 group's largest weight
becomes -8, exactly: its scale is negative where that weight is positive (llama.cpp's Q4_0 does so).
The scale is larger where the largest weight of the other sign would otherwise be more than half a
step beyond 7. On a real small model this raises the loss a third less than dividing the largest
magnitude by 7 or 7.5 does. Scales are stored in the model's own type, rounded up in magnitude. So
for every weight, in exact arithmetic,

    |weight - integer * scale| <= |scale| / 2

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
    "quantize_rtn",
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
    above, below = groups.max(axis=2), -groups.min(axis=2)
    largest = np.maximum(above, below)
    if bits == 8:
        scales = _stored_scales(largest / high, np.full_like(largest, high), scale_dtype)
        lows = np.full_like(largest, low)
    else:
        exact, needed = largest / -low, np.minimum(above, below) / (high + 0.5)
        # Near the end of the type's range the lowest integer's product may overflow: do without.
        is_extreme = -low * needed > 0.99 * _LARGEST[scale_dtype]
        needed[is_extreme] = largest[is_extreme] / (high + 0.5)
        reach = np.where(exact >= needed, -low, high)  # integer that the largest weight becomes
        scales = _stored_scales(np.maximum(exact, needed), reach, scale_dtype)
        lows = np.where(-low * scales.astype(np.float64) > _LARGEST[scale_dtype], -high, low)
        scales = np.where(above > below, -scales, scales)
    steps = np.where(scales == 0, 1, scales).astype(np.float64)  # a group of zeros has scale 0
    integers = np.clip(np.rint(groups / steps[:, :, None]), lows[:, :, None], high)
    return scales, integers.astype(np.int8)


def _stored_scales(
    wanted: npt.NDArray[np.float64], reach: npt.NDArray[np.float64], dtype: str
) -> Float32Array:
    """The smallest number of `dtype` that is at least `wanted`, which is not negative.

    The one below it where `reach` times that would overflow: the largest weight, which becomes
    that integer, is still within half a step.
    """
    nearest = from_float32(wanted.astype(np.float32), dtype)
    # Of numbers that are not negative, the next one has the next integer as its bits.
    codes = nearest.data.view(np.uint32 if dtype == "float32" else np.uint16)
    codes = codes + (to_float32(nearest) < wanted).astype(codes.dtype)
    scales = to_float32(StoredArray(dtype, codes.view(nearest.data.dtype)))
    codes = codes - (scales.astype(np.float64) * reach > _LARGEST[dtype]).astype(codes.dtype)
    return to_float32(StoredArray(dtype, codes.view(nearest.data.dtype)))
