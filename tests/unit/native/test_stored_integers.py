"""Quantized folders of others on the native runner: products of what their codes say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.layouts import linear_layers
from llmserve.native.kernels import available_paths
from llmserve.native.program import Epilogue, Program, WeightKind
from llmserve.native.reference.linear import float_linear, integer_linear
from llmserve.native.reference.quantize import quantize_rows
from llmserve.native.weights import Form, WeightSegment
from llmserve.quant.groups import QuantizedLinear, quantize_rtn
from llmserve.runners.native_options import NativeOptions
from llmserve.runners.native_runner import NativeRunner
from llmserve.tensor_file import map_tensors, write_tensors
from support.foreign_folders import FOREIGN, write_foreign_folder
from support.native_programs import run_rows
from support.variants import LLAMA, random_tensors

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not available_paths(), reason="the kernels are not built here"),
]

DOWN = "model.layers.1.mlp.down_proj.weight"
QKV = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]


def product(checkpoint: Checkpoint, rows: np.ndarray, form: Form) -> tuple[WeightKind, np.ndarray]:
    segment = WeightSegment(checkpoint, form)
    (spec,) = segment.specify([DOWN])
    segment.pack(1)
    linear = segment.packed(spec)

    def write(program: Program, source: int) -> int:
        buffer = program.buffer(linear.out)
        slot = program.prepare(source, linear.width, None, linear)
        program.linear(slot, linear, Epilogue.STORE, buffer)
        return buffer

    return spec.kind, run_rows(rows, write, linear.out, path=available_paths()[0])


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(5, 48)).astype(np.float32)


@pytest.mark.parametrize("form", FOREIGN)
def test_products_with_integer_activations_are_the_references(
    tmp_path: Path, form: Any, rows: np.ndarray
) -> None:
    write_foreign_folder(tmp_path / "model", form)
    checkpoint = Checkpoint.open(tmp_path / "model")
    linear = checkpoint.linear(DOWN)
    assert isinstance(linear, QuantizedLinear)
    assert linear.group_size is not None
    order = np.arange(48)
    if linear.group_of_input is not None:
        order = np.argsort(linear.group_of_input, kind="stable")
    weight = (linear.values[:, order], linear.scales, linear.group_size, linear.zeros)
    digits = 2 if linear.bits == 8 else 1
    quantized = quantize_rows(rows[:, order], linear.group_size, digits)
    wanted = integer_linear(quantized, *weight)
    kind, found = product(checkpoint, rows, Form(floats="float32"))
    assert kind is (WeightKind.INT8 if linear.bits == 8 else WeightKind.INT4)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("form", FOREIGN)
def test_products_with_float_activations_are_those_of_the_dequantized_weight(
    tmp_path: Path, form: Any, rows: np.ndarray
) -> None:
    _, weights = write_foreign_folder(tmp_path / "model", form)
    checkpoint = Checkpoint.open(tmp_path / "model")
    kind, found = product(checkpoint, rows, Form(floats="float32", has_integer_activations=False))
    is_mixed = form in ("gptq-order", "g_idx")
    assert (kind is WeightKind.FLOAT32) is is_mixed, "a mixed order is executed as floats"
    np.testing.assert_allclose(found, float_linear(rows, weights[DOWN]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("form", "count"), [("awq", 1), ("gptq", 1), ("gptq-order", 3)])
def test_matrices_with_orders_of_their_own_are_not_joined(
    tmp_path: Path, form: Any, count: int
) -> None:
    write_foreign_folder(tmp_path / "model", form)
    segment = WeightSegment(Checkpoint.open(tmp_path / "model"), Form(floats="float32"))
    assert len(segment.specify(QKV)) == count


def test_groups_of_different_sizes_are_executed_as_floats(tmp_path: Path, rows: np.ndarray) -> None:
    write_foreign_folder(tmp_path / "model", "gptq-order")
    file = tmp_path / "model/model.safetensors"
    tensors = map_tensors(file)
    index = tensors["model.layers.1.mlp.down_proj.g_idx"].data.copy()
    index[:] = 0
    index[40:] = 2
    changed = type(tensors["model.norm.weight"])("int32", index)
    write_tensors(file, {**tensors, "model.layers.1.mlp.down_proj.g_idx": changed})
    checkpoint = Checkpoint.open(tmp_path / "model")
    kind, found = product(checkpoint, rows, Form(floats="float32"))
    assert kind is WeightKind.FLOAT32
    np.testing.assert_allclose(found, float_linear(rows, checkpoint.float32(DOWN)), atol=1e-5)


def test_cache_is_int8_where_the_folder_asks_for_it_and_nobody_says_otherwise(
    tmp_path: Path,
) -> None:
    weights = random_tensors(LLAMA)
    layers = {
        f"{name}.weight": quantize_rtn(weights[f"{name}.weight"], 8, None)
        for name in linear_layers(LLAMA)
        if name != "lm_head"
    }
    save_model(tmp_path / "model", LLAMA, {**weights, **layers}, has_int8_cache=True)
    checkpoint = Checkpoint.open(tmp_path / "model")
    assert NativeRunner(checkpoint).info.cache_dtype == "int8"
    options = NativeOptions(cache_dtype="float32")
    assert NativeRunner(checkpoint, options).info.cache_dtype == "float32"
