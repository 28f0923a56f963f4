"""The grid of each group: which scale and which zero point, before anything is rounded.

Symmetric (`zeros` None): an int8 group's scale is its largest magnitude divided by 127. An int4
group's largest weight becomes -8, exactly: its scale is negative where that weight is positive
(llama.cpp's Q4_0 does so); the scale is larger where the largest weight of the other sign would
otherwise be more than half a step beyond 7. On a real small model this raises the loss a third less
than dividing the largest magnitude by 7 or 7.5 does.

Asymmetric: the whole range from the smallest weight to the largest, 0 included, is cut into equal
steps, and the zero point is the integer that stands for 0.

Searched: of a list of multiples of those scales the one with the smallest squared error, inputs
weighted by their importance; outliers of a group are then cut off where that pays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from .dtypes import Float32Array, StoredArray, from_float32, to_float32

__all__ = ["INTEGER_RANGE", "LARGEST", "Bits", "Grid", "make_grid", "search_grid"]

Bits = Literal[4, 8]
Doubles = npt.NDArray[np.float64]

INTEGER_RANGE: dict[int, tuple[int, int]] = {4: (-8, 7), 8: (-127, 127)}
"""Bits → smallest and largest integer that is written."""

LARGEST = {"float32": 3.4028234663852886e38, "bfloat16": 3.3895313892515355e38, "float16": 65504.0}
"""Type → its largest finite number."""

_FACTORS = (1.0, *(round(1.14 - 0.04 * step, 2) for step in range(18)))
"""Multiples of a group's scale that a search tries: 1, then 1.14 down to 0.46."""


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """What the integers of R rows in G groups stand for: (integer - zero) * scale."""

    scales: Float32Array  # [R, G], each a number of the stored type
    zeros: npt.NDArray[np.int8] | None  # [R, G]; None: 0 everywhere
    lows: npt.NDArray[np.int8]  # [R, G], the smallest integer that may be used
    high: int

    def round(self, weight: Doubles, group: int | slice = slice(None)) -> npt.NDArray[np.int8]:
        """The nearest integers of weights: [R, G, size], or [R] of one input of `group`."""
        shape = (..., None) if weight.ndim == 3 else ...
        scales = self.scales[:, group][shape].astype(np.float64)
        steps = np.where(scales == 0, 1, scales)  # a group of zeros has scale 0
        integers = np.rint(weight / steps)
        if self.zeros is not None:
            integers += self.zeros[:, group][shape]
        return np.clip(integers, self.lows[:, group][shape], self.high).astype(np.int8)

    def values(self, integers: npt.NDArray[np.int8], group: int | slice = slice(None)) -> Doubles:
        """What integers of the shape that `round` gives stand for."""
        shape = (..., None) if integers.ndim == 3 else ...
        wide = integers.astype(np.float64)
        if self.zeros is not None:
            wide -= self.zeros[:, group][shape]
        return wide * self.scales[:, group][shape]


def make_grid(
    groups: Doubles, bits: Bits, *, scale_dtype: str, is_symmetric: bool, factor: float = 1.0
) -> Grid:
    """The grid that covers weights [R, G, size], or `factor` of their range."""
    make = _symmetric if is_symmetric else _asymmetric
    return make(groups, bits, scale_dtype, factor)


def search_grid(
    groups: Doubles, bits: Bits, *, scale_dtype: str, is_symmetric: bool,
    importance: Doubles | None = None,
) -> Grid:  # fmt: skip
    """The grid with the smallest squared error of weights [R, G, size].

    Args:
        groups: the weights.
        bits: 8 or 4.
        scale_dtype: type of the stored scales.
        is_symmetric: whether the zero point is 0.
        importance: weight of each input's squared error, [G, size]; None: all alike.
    """
    best = make_grid(groups, bits, scale_dtype=scale_dtype, is_symmetric=is_symmetric)
    least = _errors(best, groups, importance)
    for factor in _FACTORS[1:]:
        grid = make_grid(
            groups, bits, scale_dtype=scale_dtype, is_symmetric=is_symmetric, factor=factor
        )
        errors = _errors(grid, groups, importance)
        is_better = errors < least
        best, least = _merge(best, grid, is_better), np.where(is_better, errors, least)
    return best


def _errors(grid: Grid, groups: Doubles, importance: Doubles | None) -> Doubles:
    off = np.square(grid.values(grid.round(groups)) - groups)
    summed: Doubles = off.sum(axis=2) if importance is None else (off * importance).sum(axis=2)
    return np.where(np.isfinite(summed), summed, np.inf)


def _merge(old: Grid, new: Grid, is_new: npt.NDArray[np.bool_]) -> Grid:
    zeros = None
    if old.zeros is not None and new.zeros is not None:
        zeros = np.where(is_new, new.zeros, old.zeros)
    return Grid(
        np.where(is_new, new.scales, old.scales),
        zeros,
        np.where(is_new, new.lows, old.lows),
        old.high,
    )


def _symmetric(groups: Doubles, bits: Bits, scale_dtype: str, factor: float) -> Grid:
    low, high = INTEGER_RANGE[bits]
    above, below = groups.max(axis=2), -groups.min(axis=2)
    largest = np.maximum(above, below)
    if bits == 8:
        reach = np.full_like(largest, high)
        scales = _stored_scales(factor * largest / high, reach, scale_dtype)
        return Grid(scales, None, np.full(largest.shape, low, np.int8), high)
    exact, needed = largest / -low, np.minimum(above, below) / (high + 0.5)
    # Near the end of the type's range the lowest integer's product may overflow: do without.
    is_extreme = -low * needed > 0.99 * LARGEST[scale_dtype]
    needed[is_extreme] = largest[is_extreme] / (high + 0.5)
    reach = np.where(exact >= needed, -low, high)  # integer that the largest weight becomes
    scales = _stored_scales(factor * np.maximum(exact, needed), reach, scale_dtype)
    lows = np.where(-low * scales.astype(np.float64) > LARGEST[scale_dtype], -high, low)
    return Grid(np.where(above > below, -scales, scales), None, lows.astype(np.int8), high)


def _asymmetric(groups: Doubles, bits: Bits, scale_dtype: str, factor: float) -> Grid:
    low, high = INTEGER_RANGE[bits]
    above = np.maximum(factor * groups.max(axis=2), 0.0)
    below = np.maximum(-factor * groups.min(axis=2), 0.0)
    # Divided first: the whole range of the widest weights is beyond the type.
    steps = above / (high - low) + below / (high - low)
    scales = _stored_scales(steps, np.full_like(steps, high - low), scale_dtype)
    widths = np.where(scales == 0, 1, scales).astype(np.float64)
    zeros = np.clip(np.rint(below / widths) + low, low, high).astype(np.int8)
    grid = Grid(scales, zeros, np.full(scales.shape, low, np.int8), high)
    # Near the end of the type's range the rounded zero point may push a product beyond it.
    is_extreme = np.maximum(above, below) > LARGEST[scale_dtype] / 4
    if not is_extreme.any():
        return grid
    other = _symmetric(groups, bits, scale_dtype, factor)
    none = np.zeros_like(zeros)
    return _merge(grid, Grid(other.scales, none, other.lows, high), is_extreme)


def _stored_scales(wanted: Doubles, reach: Doubles, dtype: str) -> Float32Array:
    """The smallest number of `dtype` that is at least `wanted`, which is not negative.

    The one below it where `reach` times that would overflow: the largest weight, which becomes
    that integer, is still within half a step.
    """
    with np.errstate(over="ignore"):
        nearest = from_float32(wanted.astype(np.float32), dtype)
    # Of numbers that are not negative, the next one has the next integer as its bits.
    codes = nearest.data.view(np.uint32 if dtype == "float32" else np.uint16)
    codes = codes + (to_float32(nearest) < wanted).astype(codes.dtype)
    scales = to_float32(StoredArray(dtype, codes.view(nearest.data.dtype)))
    codes = codes - (scales.astype(np.float64) * reach > LARGEST[dtype]).astype(codes.dtype)
    return to_float32(StoredArray(dtype, codes.view(nearest.data.dtype)))
