"""Random matrices of every layout, packed, with what the reference makes of their products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llmserve.native.kernels import load_kernels
from llmserve.native.program import Number, PackedLinear, WeightKind
from llmserve.native.reference.linear import float_linear, integer_linear, mixed_linear
from llmserve.native.reference.quantize import quantize_rows
from llmserve.quant.dtypes import from_float32, to_float32

__all__ = ["Layout", "Matrix", "random_matrix", "rounds_alike"]

Floats = np.ndarray[Any, np.dtype[np.float32]]

_CHUNK_INPUTS = {
    WeightKind.FLOAT32: 1,
    WeightKind.BFLOAT16: 2,
    WeightKind.INT4: 8,
    WeightKind.INT8: 4,
}
_BITS = {
    WeightKind.FLOAT32: 32,
    WeightKind.BFLOAT16: 16,
    WeightKind.INT4: 4,
    WeightKind.INT8: 8,
}


def rounds_alike(kind: WeightKind, path: str) -> bool:
    """Whether a path's products have the reference's bits: not bfloat16's on the matrix unit."""
    return kind is not WeightKind.BFLOAT16 or path != "amx"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a weight [out, width] is stored and multiplied."""

    out: int
    width: int
    kind: WeightKind
    group_size: int | None = None
    """Inputs of one scale; None: all."""
    scale_kind: Number = Number.FLOAT32
    has_float_rows: bool = False
    has_zeros: bool = False
    has_order: bool = False
    has_bias: bool = False

    @property
    def size(self) -> int:
        """Inputs of a group."""
        return self.group_size or self.width

    @property
    def num_digits(self) -> int:
        """Bytes of an activation."""
        return 2 if self.kind is WeightKind.INT8 else 1

    @property
    def is_integer(self) -> bool:
        """Whether there are scales."""
        return self.kind in (WeightKind.INT4, WeightKind.INT8)


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """A weight as it is packed, and as it is."""

    layout: Layout
    packed: PackedLinear
    values: np.ndarray[Any, Any]  # [out, width] floats or integers, in the order of the input
    scales: Floats | None
    zeros: np.ndarray[Any, np.dtype[np.int8]] | None  # what is taken off

    def product(self, rows: Floats) -> Floats:
        """What the kernels must give for float32 rows, bias included."""
        product = self._product(rows)
        if self.packed.bias is None:
            return product
        return product + self.packed.bias[: self.layout.out]

    def _product(self, rows: Floats) -> Floats:
        layout = self.layout
        if self.scales is None:
            return float_linear(rows, self.values)
        values, order = self.values, self.packed.order
        if order is not None:
            rows, values = rows[:, order], values[:, order]
        if layout.has_float_rows:
            return mixed_linear(rows, values, self.scales, layout.size, self.zeros)
        quantized = quantize_rows(rows, layout.size, layout.num_digits)
        return integer_linear(quantized, values, self.scales, layout.size, self.zeros)


def random_matrix(layout: Layout, rng: np.random.Generator) -> Matrix:
    """A matrix with numbers of some units, packed."""
    bias = None
    blocks = -(-layout.out // 16)
    if layout.has_bias:
        bias = np.zeros(blocks * 16, np.float32)
        bias[: layout.out] = rng.normal(size=layout.out)
    return _integers(layout, bias, rng) if layout.is_integer else _floats(layout, bias, rng)


def _floats(layout: Layout, bias: Floats | None, rng: np.random.Generator) -> Matrix:
    values = rng.normal(size=(layout.out, layout.width)).astype(np.float32)
    if layout.kind is WeightKind.BFLOAT16:
        values = to_float32(from_float32(values, "bfloat16"))
    packed = _pack(layout.kind.name.lower(), layout, values, None)
    return Matrix(layout, _linear(layout, packed, bias=bias), values, None, None)


def _integers(layout: Layout, bias: Floats | None, rng: np.random.Generator) -> Matrix:
    low, high = (-8, 8) if layout.kind is WeightKind.INT4 else (-127, 128)
    values = rng.integers(low, high, (layout.out, layout.width)).astype(np.int8)
    groups = -(-layout.width // layout.size)
    scales = rng.normal(0.0, 0.05, (layout.out, groups)).astype(np.float32)
    if layout.scale_kind is Number.BFLOAT16:
        scales = to_float32(from_float32(scales, "bfloat16"))
    order = rng.permutation(layout.width).astype(np.int32) if layout.has_order else None
    blocks = -(-layout.out // 16)
    scale_size = 2 if layout.scale_kind is Number.BFLOAT16 else 4
    scale_bytes = np.zeros(blocks * groups * 16 * scale_size, np.uint8)
    _call(f"scales-{layout.scale_kind.name.lower()}", layout, scales, None, scale_bytes)
    zeros = zero_bytes = None
    if layout.has_zeros:
        middle = 8 if layout.kind is WeightKind.INT4 else 128
        stored = rng.integers(0, 2 * middle, (layout.out, groups)).astype(np.uint8)
        zeros = (stored.astype(np.int16) - middle).astype(np.int8)
        zero_bytes = np.zeros(blocks * groups * 16, np.uint8)
        _call("zeros", layout, stored, None, zero_bytes)
    packed = _pack(layout.kind.name.lower(), layout, values, order)
    linear = _linear(
        layout, packed, bias=bias, scales=scale_bytes, zeros=zero_bytes, order=order,
    )  # fmt: skip
    return Matrix(layout, linear, values, scales, zeros)


def _linear(
    layout: Layout, values: np.ndarray[Any, np.dtype[np.uint8]], **more: Any
) -> PackedLinear:
    return PackedLinear(
        kind=layout.kind,
        out=layout.out,
        width=layout.width,
        group_size=layout.size,
        padded_group=_padded_group(layout),
        num_groups=-(-layout.width // layout.size),
        values=values,
        scale_kind=layout.scale_kind,
        has_float_rows=layout.has_float_rows,
        **more,
    )


def _padded_group(layout: Layout) -> int:
    inputs = _CHUNK_INPUTS[layout.kind]
    return -(-layout.size // inputs) * inputs


def _pack(verb: str, layout: Layout, source: np.ndarray[Any, Any], order: Any) -> Any:
    groups = -(-layout.width // layout.size)
    inputs = groups * _padded_group(layout)
    packed = np.zeros(-(-layout.out // 16) * 16 * inputs * _BITS[layout.kind] // 8, np.uint8)
    _call(verb, layout, source, order, packed)
    return packed


def _call(verb: str, layout: Layout, source: Any, order: Any, target: Any) -> None:
    kernels = load_kernels()
    assert kernels is not None, "the kernels are not built here"
    shape = (layout.out, layout.width, layout.size, _padded_group(layout), 0, 0)
    none = np.zeros(0, np.uint8)
    source = np.ascontiguousarray(source)
    assert kernels.pack(verb, shape, source, Number.FLOAT32, order, target, none)
