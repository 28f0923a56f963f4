"""Weights packed from a folder's formats: each gives the product of what the folder says."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve.native.kernels import available_paths, load_kernels
from llmserve.native.program import Epilogue, Number, PackedLinear, Program, WeightKind
from llmserve.native.reference.linear import float_linear, integer_linear
from llmserve.native.reference.quantize import quantize_rows
from llmserve.quant.dtypes import from_float32, to_float32
from llmserve.quant.groups import quantize_rtn
from support.native_programs import run_rows

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not available_paths(), reason="the kernels are not built here"),
]

PATH = available_paths()[0] if available_paths() else ""
NUMBERS = {
    "float32": Number.FLOAT32,
    "bfloat16": Number.BFLOAT16,
    "float16": Number.FLOAT16,
}


def call_pack(verb: str, shape: tuple[int, ...], source: np.ndarray, *targets: np.ndarray) -> bool:
    kernels = load_kernels()
    assert kernels is not None
    scales = targets[1] if len(targets) > 1 else np.zeros(0, np.uint8)
    return bool(kernels.pack(verb, shape, source, Number.FLOAT32, None, targets[0], scales))


def product(rows: np.ndarray, linear: PackedLinear, out: int) -> np.ndarray:
    def write(program: Program, source: int) -> int:
        buffer = program.buffer(out)
        slot = program.prepare(source, linear.width, None, linear)
        program.linear(slot, linear, Epilogue.STORE, buffer)
        return buffer

    return run_rows(rows, write, out, path=PATH)


@pytest.mark.parametrize(("width", "group"), [(8, 8), (48, 16), (172, 43), (172, 4), (300, 300)])
def test_words_hold_eight_integers_the_first_lowest(width: int, group: int) -> None:
    rng = np.random.default_rng(width)
    values = rng.integers(-8, 8, (19, width)).astype(np.int8)
    padded = np.zeros((19, -(-width // 8) * 8), np.int64)
    padded[:, :width] = values + 8
    words = (padded.reshape(19, -1, 8) << (4 * np.arange(8))).sum(axis=2).astype("<u4")
    scales = rng.normal(size=(19, width // group)).astype(np.float32)
    padded_group = -(-group // 8) * 8
    shape = (19, width, group, padded_group, 0, 0)
    num_groups = width // group
    packed = np.zeros(2 * 16 * num_groups * padded_group // 2, np.uint8)
    packed_scales = np.zeros(2 * 16 * num_groups * 4, np.uint8)
    call_pack("words", shape, words, packed)
    call_pack("scales-float32", shape, scales, packed_scales)
    linear = PackedLinear(
        WeightKind.INT4, 19, width, group, padded_group, num_groups, packed, packed_scales,
    )  # fmt: skip
    rows = rng.normal(size=(4, width)).astype(np.float32)
    wanted = integer_linear(quantize_rows(rows, group), values, scales, group)
    np.testing.assert_array_equal(product(rows, linear, 19), wanted)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [8, 44, 300])
def test_floats_rounded_at_load_are_as_good_as_the_exporters(bits: int, width: int) -> None:
    """The same rule in float32: a weight is within half a step, and a step as small."""
    rng = np.random.default_rng(width)
    weight = rng.normal(size=(16, width)).astype(np.float32)
    weight[3] = 0.0
    group = 4 if bits == 4 else width
    exported = quantize_rtn(weight, bits, group)  # type: ignore[arg-type]
    num_groups, inputs = width // group, 8 if bits == 4 else 4
    padded = -(-group // inputs) * inputs
    packed = np.zeros(16 * num_groups * padded * bits // 8, np.uint8)
    scales = np.zeros(num_groups * 16, np.float32)
    shape = (16, width, group, padded, 0, 0)
    assert call_pack(f"quantize-int{bits}", shape, weight, packed, scales.view(np.uint8))
    found = scales.reshape(num_groups, 16).T
    np.testing.assert_allclose(found, exported.scales, rtol=1e-6)
    linear = PackedLinear(
        WeightKind.INT4 if bits == 4 else WeightKind.INT8, 16, width, group, padded, num_groups,
        packed, scales.view(np.uint8), has_float_rows=True,
    )  # fmt: skip
    stored = product(np.eye(width, dtype=np.float32), linear, 16).T
    steps = np.repeat(abs(found), group, axis=1)
    assert (abs(stored - weight) <= steps * (0.5 + 1e-5)).all()
    assert np.array_equal(stored[3], np.zeros(width, np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rounding_says_that_a_weight_is_not_finite(value: float) -> None:
    weight = np.ones((16, 8), np.float32)
    weight[15, 7] = value
    scales = np.zeros(16, np.float32).view(np.uint8)
    shape = (16, 8, 8, 8, 0, 0)
    assert not call_pack("quantize-int8", shape, weight, np.zeros(128, np.uint8), scales)


@pytest.mark.parametrize("target", ["float32", "bfloat16"])
@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16"])
def test_floats_of_every_type_are_converted_to_nearest(source: str, target: str) -> None:
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=(16, 8)).astype(np.float32) * 10.0 ** np.arange(
        -7, 1, dtype=np.float32
    )
    stored = from_float32(numbers, source)
    values = np.zeros(16 * 8 * (4 if target == "float32" else 2), np.uint8)
    kernels = load_kernels()
    assert kernels is not None
    shape, none = (16, 8, 8, 8, 0, 0), np.zeros(0, np.uint8)
    kernels.pack(
        target, shape, np.ascontiguousarray(stored.data), NUMBERS[source], None, values, none
    )
    linear = PackedLinear(WeightKind[target.upper()], 16, 8, 8, 8, 1, values)
    wanted = to_float32(from_float32(to_float32(stored), target))
    found = product(np.eye(8, dtype=np.float32), linear, 16)
    np.testing.assert_array_equal(found, float_linear(np.eye(8, dtype=np.float32), wanted))


def test_rows_of_two_tensors_go_by_turns_in_blocks() -> None:
    """Gate and input of a gated feed-forward, of outputs that fill no whole block."""
    rng = np.random.default_rng(0)
    gate, up = rng.normal(size=(2, 20, 8)).astype(np.float32)
    values = np.zeros(4 * 16 * 8 * 4, np.uint8)
    for turn, tensor in ((1, gate), (2, up)):
        call_pack("float32", (20, 8, 8, 8, 0, turn), np.ascontiguousarray(tensor), values)
    linear = PackedLinear(WeightKind.FLOAT32, 64, 8, 8, 8, 1, values)
    found = product(np.eye(8, dtype=np.float32), linear, 64).T
    np.testing.assert_array_equal(found[:16], gate[:16])
    np.testing.assert_array_equal(found[16:32], up[:16])
    np.testing.assert_array_equal(found[32:36], gate[16:])
    np.testing.assert_array_equal(found[48:52], up[16:])
    assert not found[36:48].any()


@pytest.mark.parametrize(
    ("verb", "source_bytes", "value_bytes", "message"),
    [
        ("int4", 16 * 8, 16 * 4, None),
        ("int4", 16 * 8 - 1, 16 * 4, "fewer weights"),
        ("int4", 16 * 8, 16 * 4 - 1, "do not fit"),
        ("int3", 16 * 8, 16 * 4, "no packing of that name"),
    ],
)
def test_memory_that_does_not_fit_the_shape_is_an_error(
    verb: str, source_bytes: int, value_bytes: int, message: str | None
) -> None:
    shape = (16, 8, 8, 8, 0, 0)
    source, values = np.zeros(source_bytes, np.int8), np.zeros(value_bytes, np.uint8)
    if message is None:
        call_pack(verb, shape, source, values)
        return
    with pytest.raises(ValueError, match=message):
        call_pack(verb, shape, source, values)
