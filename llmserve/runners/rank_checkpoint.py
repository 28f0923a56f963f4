"""A model folder as one of several ranks sees it: each tensor is the part that the rank has.

Parts are taken from the mapped files, so a rank reads its own rows and columns and not the others'.
A quantized layer stays in its integers where its groups can be dealt out; else it is dequantized
first.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ..checkpoint import Checkpoint
from ..config import ModelConfig
from ..quant.config import QuantizationConfig
from ..quant.dtypes import Float32Array, StoredArray
from ..quant.groups import QuantizedLinear
from ..quant.layout import AnyQuantizedLinear
from .tensor_parallel import Cut, Rank, config_of_rank, cut_of

__all__ = ["RankCheckpoint", "cut_linear"]


class RankCheckpoint:
    """Implements `WeightSource` for a rank of a model that can be dealt out (`check_ranks`)."""

    def __init__(self, whole: Checkpoint, rank: Rank) -> None:
        self._whole, self._rank = whole, rank
        self.config: ModelConfig = config_of_rank(whole.config, rank)

    @property
    def quantization(self) -> QuantizationConfig | None:
        """How the folder's linear layers are quantized."""
        return self._whole.quantization

    @property
    def fingerprint(self) -> str:
        """The whole folder's."""
        return self._whole.fingerprint

    def is_quantized(self, name: str) -> bool:
        """Whether the tensor `name` is the weight of a quantized layer."""
        return self._whole.is_quantized(name)

    def stored(self, name: str) -> StoredArray:
        """The rank's part of a tensor as it is stored. Raises as `Checkpoint.stored` does."""
        array = self._whole.stored(name)
        return StoredArray(array.dtype, self._cut(name).of(array.data))

    def linear(self, name: str) -> AnyQuantizedLinear | Float32Array:
        """The rank's part of a linear layer: quantized as far as that goes, otherwise float32.

        Raises as `Checkpoint.linear` does.
        """
        value, cut = self._whole.linear(name), self._cut(name)
        if isinstance(value, QuantizedLinear):
            part = cut_linear(value, cut)
            if part is not None:
                return part
        return cut.of(value if isinstance(value, np.ndarray) else value.dequantize())

    def float32(self, name: str) -> Float32Array:
        """The rank's part of a tensor as float32. Raises as `linear` does."""
        return self._cut(name).of(self._whole.float32(name))

    def _cut(self, name: str) -> Cut:
        return cut_of(name, self._whole.shape_of(name), self._whole.config, self._rank)


def cut_linear(linear: QuantizedLinear, cut: Cut) -> QuantizedLinear | None:
    """The part of a quantized layer; None where it would begin or end within a group of inputs,
    where inputs have an order of their own, or where rows are to be filled up."""
    width = linear.shape[1]
    start, stop, _ = cut.columns.indices(width)
    is_whole = (start, stop) == (0, width)
    if cut.num_rows is not None or (linear.group_of_input is not None and not is_whole):
        return None
    size = linear.group_size
    if size is None or is_whole:
        groups = slice(None)
    elif start % size or (stop % size and stop != width):
        return None
    else:
        groups = slice(start // size, -(-stop // size))
    return dataclasses.replace(
        linear,
        values=linear.values[cut.rows, cut.columns],
        scales=linear.scales[cut.rows, groups],
        zeros=None if linear.zeros is None else linear.zeros[cut.rows, groups],
    )
