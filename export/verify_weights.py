"""A folder's weights beside those that were meant, and beside the original's: number by number.

A divergence says little of one weight among millions, and a bound on it can be honestly exceeded;
that every weight is where rounding puts it can be proven.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import numpy as np

from llmserve.checkpoint import Checkpoint
from llmserve.quant.dtypes import StoredArray
from llmserve.quant.groups import QuantizedLinear, within_half_a_step
from llmserve.quant.layout import AnyQuantizedLinear

__all__ = ["Meant", "beyond_rounding", "is_rounding_of", "unlike"]

Meant = Mapping[str, StoredArray | AnyQuantizedLinear]
"""Every tensor of a folder as it was made, by canonical name."""


def unlike(written: Checkpoint, meant: Meant) -> Iterator[str]:
    """Tensors of the folder that are not what was to be written, in words; one at a time."""
    for name, tensor in meant.items():
        if not _holds(written, name, tensor):
            yield f"tensor {name}: the folder does not hold what was quantized"


def _holds(written: Checkpoint, name: str, tensor: StoredArray | AnyQuantizedLinear) -> bool:
    if not isinstance(tensor, StoredArray):
        linear = written.linear(name)
        return not isinstance(linear, np.ndarray) and np.array_equal(
            linear.dequantize(), tensor.dequantize()
        )
    found = written.stored(name)
    # As stored: the bits, so that a NaN equals itself and a large table is not turned into float32.
    return found.dtype == tensor.dtype and np.array_equal(
        np.ascontiguousarray(found.data).view(np.uint8),
        np.ascontiguousarray(tensor.data).view(np.uint8),
    )


def beyond_rounding(
    written: Checkpoint, source: Checkpoint, names: Collection[str]
) -> Iterator[str]:
    """Those of the tensors that are further from the original's than half a step, in words."""
    for name in names:
        linear = written.linear(name)
        if not isinstance(linear, QuantizedLinear):
            continue
        count = int((~within_half_a_step(linear, source.float32(name))).sum())
        if count:
            yield (
                f"tensor {name}: {count} weights are further than half a step of their scale from "
                "the original's"
            )


def is_rounding_of(folder: Checkpoint, source: Checkpoint) -> bool:
    """Whether the folder's weights are provably the original's: rounded to nearest, or equal."""
    names = folder.names()
    if names != source.names() or any(folder.shape_of(n) != source.shape_of(n) for n in names):
        return False
    quantized = [name for name in names if folder.is_quantized(name)]
    plain = (name for name in names if not folder.is_quantized(name))
    return (
        all(isinstance(folder.linear(name), QuantizedLinear) for name in quantized)
        and all(np.array_equal(folder.float32(name), source.float32(name)) for name in plain)
        and next(beyond_rounding(folder, source, quantized), None) is None
    )
