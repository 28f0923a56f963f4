"""Products of integer weights in a graph, on inputs that rounding to int8 leaves as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmserve.quant.grids import INTEGER_RANGE, Bits
from llmserve.quant.groups import QuantizedLinear

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from llmserve.export.onnx_files import write_graph
from llmserve.export.onnx_graph import GraphBuilder
from llmserve.export.onnx_linear import Linears, block_size_of
from llmserve.model_files import GRAPH_FILE
from llmserve.runners.onnx_session import open_session

pytestmark = pytest.mark.onnx

Weights = dict[str, QuantizedLinear]


def layer(bits: Bits, size: int | None, width: int, *, has_zeros: bool) -> QuantizedLinear:
    rng = np.random.default_rng(width)
    low, high = INTEGER_RANGE[bits]
    groups = -(-width // (size or width))
    zeros = rng.integers(low, high + 1, (24, groups)).astype(np.int8) if has_zeros else None
    return QuantizedLinear(
        bits,
        size,
        rng.integers(low, high + 1, (24, width)).astype(np.int8),
        rng.uniform(0.5, 1.5, (24, groups)).astype(np.float32),
        zeros=zeros,
    )


def exact_rows(width: int) -> np.ndarray:
    """Whole numbers; the largest of every block is 127, so that a step of int8 is 1."""
    rows = np.random.default_rng(0).integers(-127, 128, (3, width)).astype(np.float32)
    rows[:, ::16] = 127.0
    return rows


def product(folder: Path, weights: Weights, rows: np.ndarray) -> np.ndarray:
    graph = GraphBuilder()
    hidden = graph.input("hidden", "float32", ["rows", rows.shape[1]])
    named = {f"{name}.weight": weight for name, weight in weights.items()}
    linears = Linears(graph, named.__getitem__, lambda _: np.empty(0, np.float32))
    output = linears.add(hidden, list(weights), "out", width=rows.shape[1], bias=False)
    graph.output(output, ["rows", 24 * len(weights)])
    write_graph(graph, folder)
    (found,) = open_session(folder / GRAPH_FILE).run(None, {"hidden": rows})
    return np.asarray(found)


@pytest.mark.parametrize("has_zeros", [False, True], ids=["", "zeros"])
@pytest.mark.parametrize("width", [48, 80])
@pytest.mark.parametrize(
    ("bits", "size"), [(4, 16), (4, None), (8, 16), (8, None), (4, 64), (8, 64)]
)
def test_product_is_that_of_the_dequantized_weight(
    tmp_path: Path, bits: Bits, size: int | None, width: int, has_zeros: bool
) -> None:
    """Groups of 64 leave a short last one."""
    weight = layer(bits, size, width, has_zeros=has_zeros)
    rows = exact_rows(width)
    wanted = rows @ weight.dequantize().T
    found = product(tmp_path, {"a": weight}, rows)
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_weights_with_and_without_zero_points_share_an_input(tmp_path: Path) -> None:
    weights = {"a": layer(4, 16, 48, has_zeros=True), "b": layer(4, 16, 48, has_zeros=False)}
    rows = exact_rows(48)
    wanted = np.concatenate([rows @ one.dequantize().T for one in weights.values()], axis=1)
    found = product(tmp_path, weights, rows)
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_activation_order_has_no_block() -> None:
    weight = layer(4, 16, 48, has_zeros=False)
    order = np.tile(np.arange(3, dtype=np.int32), 16)
    mixed = QuantizedLinear(4, 16, weight.values, weight.scales, group_of_input=order)
    assert block_size_of(weight) == 16
    assert block_size_of(mixed) is None
