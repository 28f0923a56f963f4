"""Linear layers as small integers with one scale per group of inputs.

A weight becomes `(integer - zero) * scale`; `grids.py` says how scale and zero point of a group
are found. int8 takes -127..127 (no -128: AVX2's pairwise sums of int16 would saturate), int4 takes
-8..7, the whole range of the packed format. Scales are stored in the model's own type, rounded up
in magnitude. So after rounding to nearest, in exact arithmetic,

    |weight - (integer - zero) * scale| <= |scale| / 2

and the float32 product adds at most 2**-24 of itself. Searched scales give up this bound for a
smaller squared error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, ExportError
from .dtypes import Float32Array
from .grids import INTEGER_RANGE, LARGEST, Bits, Grid, make_grid, search_grid

__all__ = [
    "INTEGER_RANGE",
    "Bits",
    "GridRule",
    "QuantizedLinear",
    "linear_of",
    "quantize_rtn",
    "quantize_to_nearest",
    "weight_grid",
    "within_half_a_step",
]

_CHUNK = 1 << 20  # weights quantized at once: bounds the float64 working copies to some 50 MB


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedLinear:
    """The weight of one linear layer: out x in integers, their scales and zero points."""

    bits: Bits
    group_size: int | None
    """Inputs that share a scale; None: one scale per output row. A row's last may be short."""
    values: npt.NDArray[np.int8]  # [out, in]
    scales: Float32Array  # [out, groups], each a number of `scale_dtype`
    scale_dtype: str = "float32"
    """Type of the scales on disk: the model's own."""
    zeros: npt.NDArray[np.int8] | None = None  # [out, groups], taken off the integers
    group_of_input: npt.NDArray[np.int32] | None = None
    """Group of each input [in], where they are not one after another (GPTQ's activation order)."""

    def __post_init__(self) -> None:
        out, width = self.values.shape
        size = self.group_size or width
        wanted = (out, -(-width // size))
        zeros = self.scales if self.zeros is None else self.zeros
        if self.scales.shape != wanted or zeros.shape != wanted:
            raise ValueError(
                f"scales of shape {self.scales.shape} do not fit values of shape "
                f"{self.values.shape} in groups of {size}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Output and input width."""
        out, width = self.values.shape
        return out, width

    def groups(self) -> npt.NDArray[np.int32]:
        """Group of each input, [in]."""
        if self.group_of_input is not None:
            return self.group_of_input
        width = np.int32(self.values.shape[1])
        groups: npt.NDArray[np.int32] = np.arange(width, dtype=np.int32) // np.int32(
            self.group_size or width
        )
        return groups

    def dequantize(self) -> Float32Array:
        """The weight as float32, [out, in]: an exact difference times the scale, rounded once."""
        group_of = self.groups()
        weight = self.values.astype(np.float32)
        if self.zeros is not None:
            weight -= self.zeros[:, group_of]
        weight *= self.scales[:, group_of]
        return weight


@dataclass(frozen=True, slots=True, kw_only=True)
class GridRule:
    """How the grid of a layer is found."""

    bits: Bits
    """8 or 4."""
    group_size: int | None
    """Inputs per scale, a divisor of the width; None: one scale per output row."""
    is_symmetric: bool = True
    """Whether the zero point is 0."""
    is_searched: bool = False
    """Whether scales are searched for the smallest squared error."""
    scale_dtype: str = "float32"
    """Type of the stored scales (`FLOAT_DTYPES`)."""


def quantize_rtn(
    weight: Float32Array,
    bits: Bits,
    group_size: int | None,
    *,
    is_symmetric: bool = True,
    scale_dtype: str = "float32",
    name: str = "weight",
) -> QuantizedLinear:
    """Round a weight [out, in] to the nearest integers of its groups. Deterministic.

    Args:
        weight: what to quantize; finite.
        bits: 8 or 4.
        group_size: inputs per scale, a divisor of `in`; None: one scale per output row.
        is_symmetric: whether the zero point is 0.
        scale_dtype: type of the stored scales (`FLOAT_DTYPES`).
        name: the layer's, for messages.

    Raises:
        ConfigError: a group size that does not divide the width, bits other than 4 and 8.
        ExportError: NaN, an infinity or a number beyond `scale_dtype` in the weight.
    """
    rule = GridRule(
        bits=bits, group_size=group_size, is_symmetric=is_symmetric, scale_dtype=scale_dtype
    )
    return quantize_to_nearest(weight, rule, name=name)


def quantize_to_nearest(
    weight: Float32Array, rule: GridRule, *, importance: Float32Array | None = None,
    name: str = "weight",
) -> QuantizedLinear:  # fmt: skip
    """Round a weight [out, in] to the nearest points of the grid that `rule` finds.

    `importance` [in] weighs the inputs in a search. Raises as `quantize_rtn` does.
    """
    out, width = weight.shape
    values = np.empty((out, width), np.int8)
    grids = []
    for rows, groups, grid in _grids(weight, rule, importance, name):
        values[rows] = grid.round(groups).reshape(-1, width)
        grids.append(grid)
    return linear_of(rule, values, _join(grids))


def within_half_a_step(linear: QuantizedLinear, weight: Float32Array) -> npt.NDArray[np.bool_]:
    """Which weights [out, in] the layer keeps as rounding to nearest must: see the module."""
    group_of = linear.groups()
    integers = linear.values.astype(np.float64)
    if linear.zeros is not None:
        integers -= linear.zeros[:, group_of]
    scales = linear.scales.astype(np.float64)[:, group_of]
    within: npt.NDArray[np.bool_] = np.abs(weight - integers * scales) <= np.abs(scales) / 2
    return within


def weight_grid(
    weight: Float32Array, rule: GridRule, *, importance: Float32Array | None = None,
    name: str = "weight",
) -> Grid:  # fmt: skip
    """The grid that `rule` finds for a weight [out, in]. Arguments and errors as above."""
    return _join([grid for _, _, grid in _grids(weight, rule, importance, name)])


def linear_of(rule: GridRule, values: npt.NDArray[np.int8], grid: Grid) -> QuantizedLinear:
    """The layer of integers [out, in] on a grid."""
    return QuantizedLinear(
        rule.bits, rule.group_size, values, grid.scales, rule.scale_dtype, grid.zeros
    )


def _grids(
    weight: Float32Array, rule: GridRule, importance: Float32Array | None, name: str
) -> Iterator[tuple[slice, npt.NDArray[np.float64], Grid]]:
    """Some rows at a time: which, their weights [rows, groups, size], their grid."""
    if rule.bits not in INTEGER_RANGE:
        raise ConfigError(f"weights are quantized to 4 or 8 bits, not {rule.bits!r}")
    out, width = weight.shape
    size = width if rule.group_size is None else rule.group_size
    if size < 1 or width % size:
        raise ConfigError(f"{name}: group size {size} does not divide the width {width}")
    weights = None if importance is None else importance.astype(np.float64).reshape(-1, size)
    step = max(1, _CHUNK // max(1, width))
    for start in range(0, out, step):
        rows = slice(start, min(out, start + step))
        _check_finite(weight[rows], rule.scale_dtype, name)
        groups = weight[rows].reshape(-1, width // size, size).astype(np.float64)
        find = partial(search_grid, importance=weights) if rule.is_searched else make_grid
        yield (
            rows,
            groups,
            find(groups, rule.bits, scale_dtype=rule.scale_dtype, is_symmetric=rule.is_symmetric),
        )


def _join(grids: list[Grid]) -> Grid:
    """The grids of some rows after those of others."""
    zeros = [grid.zeros for grid in grids if grid.zeros is not None]
    return Grid(
        np.concatenate([grid.scales for grid in grids]),
        np.concatenate(zeros) if zeros else None,
        np.concatenate([grid.lows for grid in grids]),
        grids[0].high,
    )


def _check_finite(weight: Float32Array, dtype: str, name: str) -> None:
    if not np.isfinite(weight).all():
        raise ExportError(f"{name} holds NaN or an infinity; it cannot be quantized")
    if np.abs(weight).max(initial=0.0) > LARGEST[dtype]:
        raise ExportError(f"{name} holds a weight beyond the range of {dtype}")
