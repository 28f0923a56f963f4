"""Quantized layers in the tensors that GPTQ and AWQ programs store: read, never written.

For a layer `X`, [out, in], with G groups of inputs and words of 32 bits that hold 32 / bits codes:

- GPTQ: `X.qweight` int32 [in / codes, out], the first input lowest; `X.qzeros` int32
  [G, out / codes], the first output lowest, each less by one in version 1; `X.scales` [G, out];
  `X.g_idx` int32 [in], the group of each input, which activation order mixes;
- AWQ (`gemm`): `X.qweight` int32 [in, out / 8], `X.qzeros` int32 [G, out / 8], `X.scales` [G, out];
  a word's nibbles, lowest first, are the outputs 0, 2, 4, 6, 1, 3, 5, 7.

A weight is (code - zero) * scale. Sources: the packages GPTQModel 4 and AutoAWQ 0.2.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError
from .dtypes import FLOAT_DTYPES, StoredArray, TensorSpec, to_float32
from .groups import QuantizedLinear
from .layer_groups import LayerGroup
from .packing import checked_groups

__all__ = ["from_published", "published_specs"]

_AWQ_PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""Which nibble of a word holds each of its eight outputs."""


def published_specs(shape: tuple[int, int], group: LayerGroup) -> dict[str, TensorSpec]:
    """What the file holds for a quantized layer, by the end of the tensors' names.

    Raises `CheckpointError` for a width that does not fill whole words.
    """
    out, width = shape
    codes = 32 // group.bits
    num_groups = -(-width // (group.group_size or width))
    packed = width if group.packing == "awq" else out
    if out % codes or (packed == out and width % codes):
        raise CheckpointError(
            f"{group.packing} packs {codes} weights into a word; [{out}, {width}] fills none"
        )
    specs = {
        "qzeros": TensorSpec(("int32",), (num_groups, out // codes)),
        "scales": TensorSpec(FLOAT_DTYPES, (num_groups, out)),
    }
    if group.packing == "awq":
        return specs | {"qweight": TensorSpec(("int32",), (width, out // codes))}
    specs["qweight"] = TensorSpec(("int32",), (width // codes, out))
    return specs | {"g_idx": TensorSpec(("int32", "int64"), (width,))}


def from_published(
    tensors: Mapping[str, StoredArray], shape: tuple[int, int], group: LayerGroup
) -> QuantizedLinear:
    """The layer that tensors of the expected types and shapes hold.

    Raises `CheckpointError` for a scale that is not finite or an input without a group.
    """
    scales = np.ascontiguousarray(to_float32(tensors["scales"]).T)
    if not np.isfinite(scales).all():
        raise CheckpointError("scales holds NaN or an infinity")
    order = None
    words, zero_words = tensors["qweight"].data, tensors["qzeros"].data
    if group.packing == "awq":
        codes, zeros = (_codes(part, 4)[..., _AWQ_PLACES] for part in (words, zero_words))
        values = codes.reshape(shape[1], -1).T
    else:
        values = _codes(words.T, group.bits).reshape(shape[0], -1)
        zeros = _codes(zero_words, group.bits)
        if group.packing == "gptq":
            zeros = (zeros + np.uint8(1)) & np.uint8(2**group.bits - 1)  # 0 was stored as -1
        order = checked_groups(tensors["g_idx"].data, scales.shape[1])
        if order is not None and _is_in_order(order, group.group_size or shape[1]):
            order = None
    signed_zeros = _signed(zeros.reshape(len(zero_words), -1).T, group.bits)
    return QuantizedLinear(
        group.bits, group.group_size, _signed(values, group.bits), scales,
        tensors["scales"].dtype, signed_zeros, order,
    )  # fmt: skip


def _codes(words: npt.NDArray[np.int32], bits: int) -> npt.NDArray[np.uint8]:
    """int32 [a, b] → the codes of each word, the lowest first, uint8 [a, b, 32 / bits]."""
    octets = np.ascontiguousarray(words, dtype="<i4").view(np.uint8).reshape(*words.shape, 4)
    if bits == 8:
        return octets
    nibbles = np.stack([octets & np.uint8(15), octets >> np.uint8(4)], axis=-1)
    return nibbles.reshape(*words.shape, 8)


def _signed(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int8]:
    """Codes from 0 on → integers around 0."""
    middle = 8 if bits == 4 else 128
    return np.ascontiguousarray(codes.astype(np.int16) - middle).astype(np.int8)


def _is_in_order(index: npt.NDArray[np.int32], size: int) -> bool:
    return bool((index == np.arange(len(index)) // size).all())
