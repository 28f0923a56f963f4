"""Building an ONNX graph by hand: nodes, constants and weights with readable names.

With `onnx_files.py` the one door to the package onnx. Weights stay numpy arrays here; how they
reach a file is decided when the model is written. Operators outside the standard are ONNX
Runtime's own, of the domain `com.microsoft`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

__all__ = ["CONTRIB", "INT32", "OPSET", "Axes", "GraphBuilder"]

OPSET = 23
"""The first operator set with RMSNormalization."""

CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

INT32: int = TensorProto.INT32
"""Element type, for casts."""

Axes = Sequence[int | str]
"""Extents of a tensor's axes; a string names one that varies from call to call."""

_ELEMENT_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


@dataclass(slots=True)
class GraphBuilder:
    """A graph under construction. Every method returns the name of the value it adds."""

    nodes: list[NodeProto] = field(default_factory=list)
    """In the order they are added, which is an order they can run in."""
    inputs: list[ValueInfoProto] = field(default_factory=list)
    """What a caller gives."""
    outputs: list[ValueInfoProto] = field(default_factory=list)
    """What a caller gets."""
    weights: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    """Constants of the graph, large and small, by name."""

    def input(self, name: str, dtype: str, axes: Axes) -> str:
        """An input of the graph; `dtype` is float32 or int64."""
        self.inputs.append(helper.make_tensor_value_info(name, _ELEMENT_TYPES[dtype], list(axes)))
        return name

    def output(self, name: str, axes: Axes) -> None:
        """Make the float32 value `name` an output of the graph."""
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(axes)))

    def weight(self, name: str, values: npt.NDArray[Any]) -> str:
        """A constant under its own name."""
        self.weights[name] = values
        return name

    def scalar(self, value: float | int) -> str:
        """A constant without axes: float32, or int64 for a whole number."""
        kind = np.int64 if isinstance(value, int) else np.float32
        return self.weight(f"scalar_{np.dtype(kind).name}_{value}", np.array(value, kind))

    def integers(self, *values: int) -> str:
        """A one-dimensional int64 constant."""
        name = "int64_" + "_".join(str(value) for value in values)
        return self.weight(name, np.array(values, np.int64))

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """One operator with one output."""
        return self.nodes_out(op, inputs, [output], **attributes)[0]

    def nodes_out(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any
    ) -> list[str]:
        """One operator with several outputs, named in its order; "" leaves one out.

        `domain` among the attributes is the operator's.
        """
        name = f"{outputs[0]}/{op}"
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, **attributes))
        return list(outputs)
