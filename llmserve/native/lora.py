"""LoRA adapters in a program: B (A x) added for the sequences that have one, in float32.

Source: Hu et al., arXiv 2106.09685, section 4.1. The scale alpha / r is multiplied into B.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..adapters import Adapter, LoraPair, Place
from ..config import ModelConfig
from ..quant.dtypes import Float32Array
from .kernels import load_kernels
from .program import Number, PackedLinear, Program, WeightKind

__all__ = ["LoraMatrices", "pack_float32"]


class LoraMatrices:
    """The adapters of a loaded model. False where there are none."""

    def __init__(self, config: ModelConfig, adapters: Sequence[Adapter]) -> None:
        """Check the adapters against the model.

        Raises:
            CheckpointError: an adapter does not fit.
        """
        self.adapters = tuple(adapters)
        for adapter in adapters:
            adapter.check(config)

    def __bool__(self) -> bool:
        return bool(self.adapters)

    def write(
        self, program: Program, slot: int, layer_index: int, projection: str, out: int,
        *, column: int = 0,
    ) -> None:  # fmt: skip
        """What the adapters add to one projection of `slot`'s rows, if any of them does."""
        place = Place(layer_index, projection)
        pairs = [adapter.pairs.get(place) for adapter in self.adapters]
        if any(pair is not None for pair in pairs):
            program.lora(slot, [_packed(pair) for pair in pairs], out, column=column)


def _packed(pair: LoraPair | None) -> tuple[PackedLinear, PackedLinear] | None:
    if pair is None:
        return None
    return pack_float32(pair.a), pack_float32(pair.b * np.float32(pair.scale))


def pack_float32(weight: Float32Array) -> PackedLinear:
    """A matrix [out, in] in the kernels' layout, in memory of its own."""
    kernels = load_kernels()
    assert kernels is not None, "packing without the kernels"
    out, width = weight.shape
    values = np.zeros(-(-out // 16) * 16 * width * 4, np.uint8)
    none = np.zeros(0, np.uint8)
    shape = (out, width, width, width, 0, 0)
    data = np.ascontiguousarray(weight, np.float32)
    kernels.pack("float32", shape, data, Number.FLOAT32, None, values, none)
    return PackedLinear(
        kind=WeightKind.FLOAT32,
        out=out,
        width=width,
        group_size=width,
        padded_group=width,
        num_groups=1,
        values=values,
    )
