"""Linear layers in bitsandbytes' own form: NF4 and FP4 code books, and LLM.int8.

The one door to the package bitsandbytes, which quantizing and an optimizer need: it is imported
inside `import_bitsandbytes`. Reading takes numpy alone, because the files hold the code books.

For a layer `X` of n weights the file holds what transformers writes:

- 4 bits: `X.weight` uint8 [ceil(n / 2), 1], two codes a byte, the first in the upper half;
  `X.weight.absmax` [blocks of 64], `X.weight.quant_map` [16] the code book, and the rest as JSON
  bytes in `X.weight.quant_state.bitsandbytes__nf4`. With double quantization `absmax` holds codes
  of a second book (`nested_quant_map`, `nested_absmax` per 256 blocks, an offset in the JSON);
- 8 bits: `X.weight` int8 [out, in], `X.SCB` [out] the largest magnitude of each row, and
  `X.weight_format` 0 (row-major).

Sources: QLoRA (arXiv 2305.14314), LLM.int8 (arXiv 2208.07339), bitsandbytes 0.50.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import CheckpointError, ExportError, MissingDependencyError
from .dtypes import FLOAT_DTYPES, Float32Array, StoredArray, TensorSpec, to_float32
from .groups import QuantizedLinear

__all__ = [
    "BitsAndBytesFormat",
    "BitsAndBytesLinear",
    "from_stored",
    "import_bitsandbytes",
    "quantize_bitsandbytes",
    "runs_in_kernels",
    "stored_specs",
]

_BLOCK = 64  # weights that share a scale
_NESTED_BLOCK = 256  # scales that share a scale, with double quantization
_LARGEST_FLOAT16 = 65504.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BitsAndBytesFormat:
    """What bitsandbytes made of the linear layers."""

    kind: Literal["nf4", "fp4", "int8"]
    """4-bit code book, or LLM.int8."""
    double_quant: bool = False
    """Whether the 4-bit blocks' scales are themselves 8-bit."""
    compute_dtype: str = "float32"
    """Type of the products in 4-bit layers, as others execute them."""


@dataclass(frozen=True, slots=True, eq=False)
class BitsAndBytesLinear:
    """The weight of one linear layer as bitsandbytes stores it."""

    form: BitsAndBytesFormat
    shape: tuple[int, int]
    """Output and input width."""
    tensors: Mapping[str, StoredArray]
    """Tensors by the end of their name: `weight`, `weight.absmax`, `SCB` ..."""

    def dequantize(self) -> Float32Array:
        """The weight as float32, [out, in]."""
        if self.form.kind == "int8":
            linear = self.as_integers()
            return linear.values.astype(np.float32) * linear.scales
        packed = self.tensors["weight"].data.reshape(-1)
        codes = np.stack([packed >> np.uint8(4), packed & np.uint8(15)], axis=1).reshape(-1)
        num_weights = self.shape[0] * self.shape[1]
        values = to_float32(self.tensors["weight.quant_map"])[codes[:num_weights]]
        return (values * np.repeat(self.block_scales(), _BLOCK)[:num_weights]).reshape(self.shape)

    def as_integers(self) -> QuantizedLinear:
        """LLM.int8() as what it is: integers with one scale for each row."""
        scales = to_float32(self.tensors["SCB"]) / np.float32(127.0)
        return QuantizedLinear(8, None, self.tensors["weight"].data, scales[:, None])

    def block_scales(self) -> Float32Array:
        """The scales of 4-bit blocks, double quantization undone, [blocks]."""
        absmax = self.tensors["weight.absmax"]
        if not self.form.double_quant:
            return to_float32(absmax)
        outer = np.repeat(to_float32(self.tensors["weight.nested_absmax"]), _NESTED_BLOCK)
        scales = to_float32(self.tensors["weight.nested_quant_map"])[absmax.data]
        offset = np.float32(_quant_state(self.tensors[_state_name(self.form)])["nested_offset"])
        return np.asarray(scales * outer[: scales.size] + offset, np.float32)


def runs_in_kernels(shape: tuple[int, int], kind: str) -> bool:
    """Whether bitsandbytes' CPU kernels take a layer: 4 bits need out % 32 == in % 64 == 0."""
    out, width = shape
    return kind == "int8" or (out % 32 == 0 and width % _BLOCK == 0)


def quantize_bitsandbytes(
    weight: Float32Array, form: BitsAndBytesFormat, *, dtype: str, name: str = "weight"
) -> BitsAndBytesLinear:
    """Quantize a weight [out, in] of a model stored as `dtype`, as transformers does on loading.

    Raises:
        ExportError: NaN or an infinity in the weight; for int8 a weight beyond float16.
        MissingDependencyError: bitsandbytes or torch is not installed.
    """
    torch, bitsandbytes = import_bitsandbytes("quantizing to nf4 or bnb-int8")
    functional = bitsandbytes.functional
    largest = float(np.abs(weight).max(initial=0.0))
    if not np.isfinite(largest):
        raise ExportError(f"{name} holds NaN or an infinity; it cannot be quantized")
    if form.kind == "int8" and largest > _LARGEST_FLOAT16:
        raise ExportError(
            f"{name} holds a weight of magnitude {largest:g}; bitsandbytes' int8 takes at most "
            f"{_LARGEST_FLOAT16:g}"
        )
    tensor = torch.tensor(weight)
    stored: dict[str, Any]
    if form.kind == "int8":
        # The package turns every weight to float16 first.
        values, row_scales, _ = functional.int8_vectorwise_quant(tensor.to(torch.float16))
        stored = {"weight": values, "SCB": row_scales}
        stored["weight_format"] = torch.zeros((), dtype=torch.uint8)
    else:
        packed, state = functional.quantize_4bit(
            tensor.to(getattr(torch, dtype)),
            blocksize=_BLOCK,
            compress_statistics=form.double_quant,
            quant_type=form.kind,
        )
        parts = state.as_dict(packed=True)
        stored = {"weight": packed, **{f"weight.{part}": parts[part] for part in sorted(parts)}}
    tensors = {
        part: StoredArray(str(value.dtype).removeprefix("torch."), value.numpy())
        for part, value in stored.items()
    }
    out, width = weight.shape
    return BitsAndBytesLinear(form, (out, width), tensors)


def import_bitsandbytes(feature: str) -> tuple[Any, Any]:
    """torch and bitsandbytes, without the network and without its notice about it.

    Raises `MissingDependencyError`, saying that `feature` needs them, if one is missing. On some
    CPUs the package asks for another one, `kernels`, that downloads a program on import.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    is_hidden = "kernels" not in sys.modules
    if is_hidden:
        sys.modules["kernels"] = None  # type: ignore[assignment]  # importing it fails
    try:
        import bitsandbytes
        import torch
    except ImportError as error:
        raise MissingDependencyError("bitsandbytes", extra="bnb", feature=feature) from error
    finally:
        if is_hidden:
            del sys.modules["kernels"]
    return torch, bitsandbytes


def stored_specs(shape: tuple[int, int], form: BitsAndBytesFormat) -> dict[str, TensorSpec]:
    """What the file holds for a layer of that shape, by the end of the tensors' names."""
    out, width = shape
    if form.kind == "int8":
        return {
            "weight": TensorSpec(("int8",), shape),
            "SCB": TensorSpec(("float32",), (out,)),
            "weight_format": TensorSpec(("uint8",), ()),
        }
    num_weights = out * width
    blocks = -(-num_weights // _BLOCK)
    specs = {
        "weight": TensorSpec(("uint8",), ((num_weights + 1) // 2, 1)),
        "weight.absmax": TensorSpec(("uint8",) if form.double_quant else FLOAT_DTYPES, (blocks,)),
        "weight.quant_map": TensorSpec(("float32",), (16,)),
        _state_name(form): TensorSpec(("uint8",), (None,)),
    }
    if form.double_quant:
        outer = -(-blocks // _NESTED_BLOCK)
        specs["weight.nested_absmax"] = TensorSpec(("float32",), (outer,))
        specs["weight.nested_quant_map"] = TensorSpec(("float32",), (256,))
    return specs


def from_stored(
    tensors: Mapping[str, StoredArray], shape: tuple[int, int], form: BitsAndBytesFormat
) -> BitsAndBytesLinear:
    """The layer that tensors of the expected types and shapes hold.

    Raises `CheckpointError` for a block size, a shape or a code that this reader does not honour.
    """
    if form.kind != "int8":
        state = _quant_state(tensors[_state_name(form)])
        expected: dict[str, Any] = {"quant_type": form.kind, "blocksize": _BLOCK}
        if form.double_quant:
            expected["nested_blocksize"] = _NESTED_BLOCK
        wrong = {key: state.get(key) for key, value in expected.items() if state.get(key) != value}
        if wrong or state.get("shape") != list(shape):
            raise CheckpointError(
                f"bitsandbytes' quant_state says {wrong or state.get('shape')}, "
                f"expected {expected} and the shape {list(shape)}"
            )
        if form.double_quant and not isinstance(state.get("nested_offset"), float):
            raise CheckpointError("bitsandbytes' quant_state has no number nested_offset")
    return BitsAndBytesLinear(form, shape, tensors)


def _state_name(form: BitsAndBytesFormat) -> str:
    return f"weight.quant_state.bitsandbytes__{form.kind}"


def _quant_state(stored: StoredArray) -> dict[str, Any]:
    try:
        state = json.loads(stored.data.tobytes())
    except ValueError as error:
        raise CheckpointError(f"bitsandbytes' quant_state is no JSON: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError("bitsandbytes' quant_state is no JSON object")
    return state
