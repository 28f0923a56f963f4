"""Matrix products of an exported graph, in the numbers that the weights are kept in.

Three forms, each the fastest of those tried on ONNX Runtime's CPU provider (docs/onnx.md):

- float32: one MatMul;
- int8, one scale for each output: activations are rounded to int8 with a scale for each row, by
  plain operators, for MatMulInteger. `DynamicQuantizeLinear` would take one scale for the whole
  tensor, so that a neighbour in the batch would change an answer;
- integers in groups or with zero points: MatMulNBits at accuracy level 4, which rounds activations
  to int8 by row and group.

What shares an input is one product: its rows lie one after another in one weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from llmserve.quant.dtypes import Float32Array
from llmserve.quant.groups import QuantizedLinear, quantize_rtn

from .onnx_graph import CONTRIB, GraphBuilder

__all__ = ["Linears", "Scheme", "block_size_of", "in_scheme"]

Scheme = Literal["fp32", "int8", "int4"]
"""What a model that is not quantized is exported as."""

Weight = QuantizedLinear | Float32Array
"""One linear layer's, [out, in]."""

_INT4_GROUP = 32
_LEAST_BLOCK, _LARGEST_BLOCK = 16, 256  # MatMulNBits takes powers of two
_ZERO_POINT = 128
_LEAST_SCALE = 1e-30  # of a row of zeros


def in_scheme(weight: Float32Array, scheme: Scheme, name: str) -> Weight:
    """A float32 weight [out, in] as the scheme has it, rounded to nearest.

    int4 has groups of 32 inputs; a width that is no multiple of it is filled up with zeros.

    Raises `ExportError` for NaN or an infinity.
    """
    if scheme == "fp32":
        return weight
    if scheme == "int8":
        return quantize_rtn(weight, 8, None, name=name)
    padded = np.pad(weight, ((0, 0), (0, -weight.shape[1] % _INT4_GROUP)))
    return quantize_rtn(padded, 4, _INT4_GROUP, name=name)


def block_size_of(weight: QuantizedLinear) -> int | None:
    """The block in which MatMulNBits takes the weight; None: in none.

    A group is cut into blocks of a power of two with equal scales; a whole row may end within one.
    Groups whose inputs are not one after another are taken in none.
    """
    if weight.group_of_input is not None:
        return None
    if weight.group_size is None:
        return _INT4_GROUP
    block = min(weight.group_size & -weight.group_size, _LARGEST_BLOCK)
    return block if block >= _LEAST_BLOCK else None


@dataclass(slots=True)
class Linears:
    """Adds products to a graph."""

    graph: GraphBuilder
    read: Callable[[str], Weight]
    """Weight of a linear layer by its canonical name, with `.weight`."""
    floats: Callable[[str], Float32Array]
    """Any other tensor by its canonical name."""
    _rounded_inputs: set[str] = field(default_factory=set)

    def add(
        self, hidden: str, layers: Sequence[str], output: str, *, width: int, bias: bool
    ) -> str:
        """`hidden` [..., width] times the weights of `layers`, one after another, [..., out].

        `output` names the product; layers in different forms are computed one by one and joined.
        """
        weights = [self.read(f"{layer}.weight") for layer in layers]
        if len({_form(weight) for weight in weights}) == 1:
            product = self._product(hidden, weights, output, width)
        else:
            parts = [
                self._product(hidden, [weight], layer, width)
                for weight, layer in zip(weights, layers, strict=True)
            ]
            product = self.graph.node("Concat", parts, f"{output}.joined", axis=-1)
        if not bias:
            return product
        joined = np.concatenate([self.floats(f"{layer}.bias") for layer in layers])
        return self.graph.node(
            "Add", [product, self.graph.weight(f"{output}.bias", joined)], f"{output}.biased"
        )

    def _product(self, hidden: str, weights: Sequence[Weight], name: str, width: int) -> str:
        form, _ = _form(weights[0])
        integers = [weight for weight in weights if isinstance(weight, QuantizedLinear)]
        if form == "rows":
            return self._rows(hidden, integers, name)
        if form == "blocks":
            return self._blocks(hidden, integers, name, width)
        joined = np.concatenate([_float(weight) for weight in weights])
        transposed = self.graph.weight(f"{name}.weight", np.ascontiguousarray(joined.T))
        return self.graph.node("MatMul", [hidden, transposed], f"{name}.product")

    def _rows(self, hidden: str, weights: Sequence[QuantizedLinear], name: str) -> str:
        """Integer products of int8 rows, then one scale for the row and one for the output."""
        graph = self.graph
        integers, inverse = self._rounded(hidden)
        values = np.concatenate([weight.values for weight in weights])
        scales = np.concatenate([weight.scales[:, 0] for weight in weights])
        matrix = graph.weight(f"{name}.weight", np.ascontiguousarray(values.T))
        zero = graph.weight("uint8_zero_point", np.array(_ZERO_POINT, np.uint8))
        product = graph.node("MatMulInteger", [integers, matrix, zero], f"{name}.integers")
        product = graph.node("Cast", [product], f"{name}.floats", to=TensorProto.FLOAT)
        product = graph.node(
            "Mul", [product, graph.weight(f"{name}.scale", scales)], f"{name}.scaled"
        )
        return graph.node("Div", [product, inverse], f"{name}.product")

    def _rounded(self, hidden: str) -> tuple[str, str]:
        """`hidden` as integers 1..255 around 128, and 127 / the largest magnitude of each row."""
        graph, inverse, integers = self.graph, f"{hidden}/inverse", f"{hidden}/uint8"
        if hidden in self._rounded_inputs:
            return integers, inverse
        self._rounded_inputs.add(hidden)
        largest = graph.node("Abs", [hidden], f"{hidden}/magnitudes")
        largest = graph.node("ReduceMax", [largest, graph.integers(-1)], f"{hidden}/largest")
        largest = graph.node("Max", [largest, graph.scalar(_LEAST_SCALE)], f"{hidden}/bounded")
        graph.node("Div", [graph.scalar(127.0), largest], inverse)
        steps = graph.node("Mul", [hidden, inverse], f"{hidden}/steps")
        steps = graph.node("Round", [steps], f"{hidden}/rounded")
        steps = graph.node("Add", [steps, graph.scalar(float(_ZERO_POINT))], f"{hidden}/shifted")
        graph.node("Cast", [steps], integers, to=TensorProto.UINT8)
        return integers, inverse

    def _blocks(
        self, hidden: str, weights: Sequence[QuantizedLinear], name: str, width: int
    ) -> str:
        block = block_size_of(weights[0])
        assert block is not None, "a group that MatMulNBits does not take"
        packed = np.concatenate([_packed(weight, block) for weight in weights])
        scales = np.concatenate([_by_block(weight, weight.scales, block) for weight in weights])
        inputs = [
            hidden,
            self.graph.weight(f"{name}.weight", packed),
            self.graph.weight(f"{name}.scale", scales),
        ]
        zeros = [_packed_zeros(weight, block) for weight in weights if weight.zeros is not None]
        if zeros:
            inputs.append(self.graph.weight(f"{name}.zero_point", np.concatenate(zeros)))
        return self.graph.node(
            "MatMulNBits",
            inputs,
            f"{name}.product",
            domain=CONTRIB,
            K=width,
            N=len(packed),
            bits=weights[0].bits,
            block_size=block,
            accuracy_level=4,
        )


def _form(weight: Weight) -> tuple[str, tuple[int, int | None, bool]]:
    """How the weight is multiplied; equal forms can be one product."""
    if isinstance(weight, np.ndarray):
        return "float", (32, None, False)
    if _is_row(weight):
        return "rows", (8, None, False)
    block = block_size_of(weight)
    if block is None:
        return "float", (32, None, False)
    return "blocks", (weight.bits, block, weight.zeros is not None)


def _is_row(weight: QuantizedLinear) -> bool:
    return weight.bits == 8 and weight.group_size is None and weight.zeros is None


def _float(weight: Weight) -> Float32Array:
    return weight if isinstance(weight, np.ndarray) else weight.dequantize()


def _packed(weight: QuantizedLinear, block: int) -> npt.NDArray[np.uint8]:
    """Integers above their zero point, [out, blocks, bytes]; of two in a byte the first is low."""
    padded = np.pad(weight.values, ((0, 0), (0, -weight.shape[1] % block)))
    return _unsigned(padded, weight.bits).reshape(len(padded), -1, block * weight.bits // 8)


def _packed_zeros(weight: QuantizedLinear, block: int) -> npt.NDArray[np.uint8]:
    """Zero points [out, bytes], packed as integers are; the last byte may be half empty."""
    assert weight.zeros is not None, "zero points of a symmetric weight"
    zeros = _by_block(weight, weight.zeros, block)
    empty = zeros.shape[1] % 2 if weight.bits == 4 else 0
    return _unsigned(np.pad(zeros, ((0, 0), (0, empty))), weight.bits)


def _unsigned(values: npt.NDArray[np.int8], bits: int) -> npt.NDArray[np.uint8]:
    """Integers [rows, n] above the lowest; of two in a byte the first is low."""
    unsigned = (values.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    if bits == 8:
        return unsigned
    packed: npt.NDArray[np.uint8] = np.bitwise_or(unsigned[:, ::2], unsigned[:, 1::2] << 4)
    return packed


def _by_block(weight: QuantizedLinear, of_groups: npt.NDArray[Any], block: int) -> npt.NDArray[Any]:
    """[out, blocks]: what a group has, once for each of its blocks."""
    num_blocks = -(-weight.shape[1] // block)
    times = num_blocks if weight.group_size is None else weight.group_size // block
    return np.repeat(of_groups, times, axis=1)[:, :num_blocks]
