"""A folder's quantized matrices as the kernels take them: which form, which integers, which order.

compressed-tensors' int4 words are packed as they lie in the file; every other integer format is
unpacked first. GPTQ's activation order becomes an order of inputs, in which a group's lie together.
Without integer activations, or where groups of a mixed order have different sizes, such a matrix is
executed as the float32 that it stands for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..checkpoint import Checkpoint
from ..errors import CheckpointError
from ..quant.dtypes import Float32Array, StoredArray, to_float32
from ..quant.groups import QuantizedLinear
from ..quant.layer_groups import LayerGroup
from ..quant.packing import checked_groups
from .program import Number, WeightKind

__all__ = ["StoredForm", "StoredIntegers", "number_of", "read_integers", "stored_form"]

_NUMBERS = {
    "float32": Number.FLOAT32,
    "bfloat16": Number.BFLOAT16,
    "float16": Number.FLOAT16,
}
_MIDDLE = {4: 8, 8: 128}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredForm:
    """How the matrix of a folder is executed."""

    kind: WeightKind
    group_size: int
    """Inputs of one scale."""
    has_float_rows: bool
    """Whether integers are multiplied with float32 activations."""
    scale_kind: Number = Number.FLOAT32
    has_zeros: bool = False
    has_order: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class StoredIntegers:
    """One matrix [rows, width] in integers."""

    integers: npt.NDArray[Any]
    """int8 [rows, width], or int32 words that hold eight int4."""
    scales: Float32Array  # [rows, groups]
    zeros: npt.NDArray[np.uint8] | None = None  # [rows, groups], as the kernels take them
    order: npt.NDArray[np.int32] | None = None  # [width], the input that comes k-th

    @property
    def is_packed(self) -> bool:
        """Whether the integers are words."""
        return bool(self.integers.dtype == np.dtype("<i4"))


def stored_form(
    checkpoint: Checkpoint, name: str, *, floats: Literal["float32", "bfloat16"],
    has_integer_activations: bool,
) -> StoredForm:  # fmt: skip
    """How the matrix `name` is executed; `floats` is the type of those that are not quantized."""
    quantization, width = checkpoint.quantization, checkpoint.shape_of(name)[1]
    has_float_rows = not has_integer_activations
    float32 = StoredForm(kind=WeightKind.FLOAT32, group_size=width, has_float_rows=False)
    bfloat16 = replace(float32, kind=WeightKind.BFLOAT16)
    if quantization is None or not checkpoint.is_quantized(name):
        return bfloat16 if floats == "bfloat16" else float32
    if quantization.bitsandbytes is not None:
        if quantization.bitsandbytes.kind != "int8":
            return bfloat16
        return StoredForm(kind=WeightKind.INT8, group_size=width, has_float_rows=has_float_rows)
    group = quantization.group_of(name.removesuffix(".weight"))
    assert group is not None, "a quantized layer without a group"
    parts = checkpoint.quantized_parts(name)
    index = _group_of_input(parts, group, width)
    if index is not None and (has_float_rows or _order(index, group, width) is None):
        return float32
    scales = parts["weight_scale" if "weight_scale" in parts else "scales"].dtype
    return StoredForm(
        kind=WeightKind.INT4 if group.bits == 4 else WeightKind.INT8,
        group_size=group.group_size or width,
        has_float_rows=has_float_rows,
        scale_kind=Number.BFLOAT16 if scales == "bfloat16" else Number.FLOAT32,
        has_zeros=not group.is_symmetric,
        has_order=index is not None,
    )


def read_integers(checkpoint: Checkpoint, name: str) -> StoredIntegers:
    """The integers, scales and zero points of the matrix `name`.

    Raises:
        CheckpointError: scales that are not finite, or contents that are malformed.
    """
    parts = checkpoint.quantized_parts(name)
    if "SCB" in parts:
        scales = to_float32(parts["SCB"])[:, None] / np.float32(127.0)
        found = StoredIntegers(np.ascontiguousarray(parts["weight"].data), scales)
    elif parts.keys() == {"weight_packed", "weight_scale", "weight_shape"} and _is_int4(parts):
        words = np.ascontiguousarray(parts["weight_packed"].data)
        found = StoredIntegers(words, np.ascontiguousarray(to_float32(parts["weight_scale"])))
    else:
        linear = checkpoint.linear(name)
        assert isinstance(linear, QuantizedLinear), "integers that are no groups"
        found = _unpacked(linear)
    if not np.isfinite(found.scales).all():
        raise CheckpointError(f"{checkpoint.path}: the scales of {name} hold NaN or an infinity")
    return found


def _unpacked(linear: QuantizedLinear) -> StoredIntegers:
    zeros = order = None
    if linear.zeros is not None:
        zeros = (linear.zeros.astype(np.int16) + _MIDDLE[linear.bits]).astype(np.uint8)
    if linear.group_of_input is not None:
        order = np.argsort(linear.group_of_input, kind="stable").astype(np.int32)
    integers = np.ascontiguousarray(linear.values)
    return StoredIntegers(integers, np.ascontiguousarray(linear.scales), zeros, order)


def _is_int4(parts: dict[str, StoredArray]) -> bool:
    _, width = parts["weight_shape"].data.tolist()
    num_words: int = -(-width // 8)
    return parts["weight_packed"].shape[1] == num_words


def _group_of_input(
    parts: dict[str, StoredArray], group: LayerGroup, width: int
) -> npt.NDArray[np.int32] | None:
    """Each input's group, where they are not one after another."""
    stored = parts.get("weight_g_idx") or parts.get("g_idx")
    if not group.has_order or stored is None:
        return None
    size = group.group_size or width
    index = checked_groups(stored.data, -(-width // size))
    return None if index is None or (index == np.arange(width) // size).all() else index


def _order(
    index: npt.NDArray[np.int32], group: LayerGroup, width: int
) -> npt.NDArray[np.int32] | None:
    """The inputs of group 0, of group 1 ...; None where groups are not of one size."""
    order = np.argsort(index, kind="stable").astype(np.int32)
    is_regular = (index[order] == np.arange(width) // (group.group_size or width)).all()
    return order if is_regular else None


def number_of(stored: StoredArray) -> Number:
    """The kernels' number for the type of a stored float tensor."""
    return _NUMBERS[stored.dtype]
