"""Number types of stored tensors, in numpy, which has no bfloat16 of its own.

A bfloat16 is the upper half of a float32, so its arrays travel as `uint16` beside the type's name.
Conversions round to nearest, ties to even (IEEE 754-2019, 4.3.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = [
    "FLOAT_DTYPES",
    "NUMPY_DTYPES",
    "Float32Array",
    "StoredArray",
    "TensorSpec",
    "from_float32",
    "to_float32",
]

Float32Array = npt.NDArray[np.float32]

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
}
"""Type name of a stored tensor → type of the numpy array that carries it."""

FLOAT_DTYPES = ("float32", "bfloat16", "float16")
"""Types that weights and scales may be stored in."""


class TensorSpec(NamedTuple):
    """What a file must hold under one name."""

    dtypes: tuple[str, ...]
    """Types that are accepted, the one that is written first."""
    shape: tuple[int | None, ...]
    """Extent of each axis; None: any."""

    def accepts(self, array: StoredArray) -> bool:
        """Whether type and shape of `array` are those expected."""
        return (
            array.dtype in self.dtypes
            and len(array.shape) == len(self.shape)
            and all(
                want in (None, have) for want, have in zip(self.shape, array.shape, strict=True)
            )
        )

    def __str__(self) -> str:
        axes = ", ".join("*" if extent is None else str(extent) for extent in self.shape)
        return f"{' or '.join(self.dtypes)} [{axes}]"


_BFLOAT16_NAN = np.uint32(0x0040)  # a set bit in the kept half, so that a NaN stays one


@dataclass(frozen=True, slots=True, eq=False)
class StoredArray:
    """A tensor as it lies in a file. Raises `ValueError` if `data` cannot carry `dtype`."""

    dtype: str
    """Name of the type, one of `NUMPY_DTYPES`."""
    data: npt.NDArray[Any]
    """The values; bfloat16 as the `uint16` of its bits."""

    def __post_init__(self) -> None:
        expected = NUMPY_DTYPES.get(self.dtype)
        if expected is None:
            raise ValueError(f"unknown dtype {self.dtype!r}; known: {', '.join(NUMPY_DTYPES)}")
        if self.data.dtype != expected:
            raise ValueError(f"dtype {self.dtype} is carried by {expected}, not {self.data.dtype}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent of each axis."""
        return self.data.shape

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.data.nbytes


def to_float32(array: StoredArray) -> Float32Array:
    """The values as float32, exactly. A float32 array is returned as it is, not copied.

    Raises `ValueError` for integer types.
    """
    if array.dtype == "float32":
        return array.data
    if array.dtype == "bfloat16":
        return (array.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if array.dtype == "float16":
        return array.data.astype(np.float32)
    raise ValueError(f"{array.dtype} values are no floating-point numbers")


def from_float32(values: Float32Array, dtype: str) -> StoredArray:
    """Round float32 values to `dtype`; what lies beyond its range becomes infinite.

    Raises `ValueError` for a type that is not one of `FLOAT_DTYPES`.
    """
    values = np.ascontiguousarray(values, dtype=np.float32).reshape(np.shape(values))
    if dtype == "float32":
        return StoredArray(dtype, values)
    if dtype == "bfloat16":
        return StoredArray(dtype, _bfloat16_bits(values))
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return StoredArray(dtype, values.astype(np.float16))
    raise ValueError(f"floats are stored as {', '.join(FLOAT_DTYPES)}, not {dtype!r}")


def _bfloat16_bits(values: Float32Array) -> npt.NDArray[np.uint16]:
    bits = values.view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))  # ties to even
    rounded = (bits + half) >> np.uint32(16)
    kept_nan = (bits >> np.uint32(16)) | _BFLOAT16_NAN
    return np.where(np.isnan(values), kept_nan, rounded).astype(np.uint16)
