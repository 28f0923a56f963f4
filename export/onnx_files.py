"""A built graph as files: `model.onnx`, and its weights beside it where they are large.

A protobuf message cannot exceed 2 GB, so weights above 1.5 GB go into one file, `model.onnx.data`,
each at a multiple of 4096 bytes, from where ONNX Runtime maps them. Both files are written durably,
and the same graph gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from llmserve import __version__, failpoints
from llmserve.durable import write_bytes, write_chunks
from llmserve.errors import CheckpointError
from llmserve.model_files import GRAPH_FILE
from llmserve.quant.dtypes import StoredArray

from .onnx_graph import CONTRIB, OPSET, GraphBuilder

__all__ = ["DATA_FILE", "check_files", "graph_tensors", "write_graph"]

DATA_FILE = "model.onnx.data"

_EXTERNAL_ABOVE = 1_500_000_000  # bytes of weights
_SMALL = 1024  # bytes; constants up to this size stay inside in any case
_ALIGNMENT = 4096
_IR_VERSION = 11  # the first that knows operator set 23


def write_graph(graph: GraphBuilder, folder: Path, *, external_above: int | None = None) -> None:
    """Write the graph into `folder`.

    Args:
        graph: what to write.
        folder: an existing folder.
        external_above: bytes of weights from which on they get a file of their own (default:
            1.5 GB).

    Raises `OSError`.
    """
    limit = _EXTERNAL_ABOVE if external_above is None else external_above
    is_external = sum(values.nbytes for values in graph.weights.values()) > limit
    outside = {name for name, values in graph.weights.items() if values.nbytes > _SMALL}
    offsets = _offsets(graph, outside if is_external else set())
    failpoints.hit("onnx.write")
    if is_external:
        write_chunks(folder / DATA_FILE, _data(graph, offsets))
    write_bytes(folder / GRAPH_FILE, _model(graph, offsets).SerializeToString(deterministic=True))


def check_files(folder: Path) -> None:
    """Run onnx's own checks on what was written, shapes included. Raises `onnx.checker`'s error."""
    onnx.checker.check_model(str(folder / GRAPH_FILE), full_check=True)


def graph_tensors(folder: Path) -> dict[str, StoredArray]:
    """The weights in the graph of `folder` by name, small constants too.

    Raises `CheckpointError` for a file that is no graph, or weights that lie outside the folder.
    """
    path = folder / GRAPH_FILE
    try:
        graph = onnx.load(path).graph
    except Exception as error:  # protobuf's, onnx's and the system's have no common base
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    arrays = ((tensor.name, numpy_helper.to_array(tensor)) for tensor in graph.initializer)
    return {name: StoredArray(array.dtype.name, array) for name, array in arrays}


def _offsets(graph: GraphBuilder, outside: set[str]) -> dict[str, int]:
    """Name → place in the data file of every weight that goes there."""
    offsets: dict[str, int] = {}
    end = 0
    for name, values in graph.weights.items():
        if name in outside:
            offsets[name] = end
            end += -(-values.nbytes // _ALIGNMENT) * _ALIGNMENT
    return offsets


def _data(graph: GraphBuilder, offsets: dict[str, int]) -> Iterator[bytes | memoryview]:
    for name in offsets:
        values = np.ascontiguousarray(graph.weights[name])
        yield values.reshape(-1).view(np.uint8).data
        yield b"\0" * (-values.nbytes % _ALIGNMENT)


def _model(graph: GraphBuilder, offsets: dict[str, int]) -> onnx.ModelProto:
    weights = [_tensor(graph, name, offsets.get(name)) for name in graph.weights]
    decoder = helper.make_graph(graph.nodes, "decoder", graph.inputs, graph.outputs, weights)
    return helper.make_model(
        decoder,
        producer_name="llmserve",
        producer_version=__version__,
        ir_version=_IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)],
    )


def _tensor(graph: GraphBuilder, name: str, offset: int | None) -> TensorProto:
    values = graph.weights[name]
    kind = helper.np_dtype_to_tensor_dtype(values.dtype)
    if offset is None:
        raw = np.ascontiguousarray(values).tobytes()
        return helper.make_tensor(name, kind, values.shape, raw, raw=True)
    tensor = TensorProto(name=name, data_type=kind, dims=values.shape, raw_data=b"")
    external_data_helper.set_external_data(
        tensor, location=DATA_FILE, offset=offset, length=values.nbytes
    )
    tensor.ClearField("raw_data")
    return tensor
