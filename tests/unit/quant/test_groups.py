"""Round to nearest in groups: what becomes of single weights, and what is refused."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from llmserve.errors import ConfigError, ExportError
from llmserve.quant.dtypes import FLOAT_DTYPES, from_float32, to_float32
from llmserve.quant.groups import QuantizedLinear, quantize_rtn

BITS: list[Literal[4, 8]] = [4, 8]


def random_weight(out: int, width: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((out, width)).astype(np.float32)


def test_int8_takes_the_largest_magnitude_to_127() -> None:
    linear = quantize_rtn(np.array([[-127.0, 64.0, 3.4, 0.0]], np.float32), 8, None)
    assert linear.values.tolist() == [[-127, 64, 3, 0]]
    assert linear.scales.tolist() == [[1.0]]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_int4_keeps_the_largest_weight_exactly(sign: float) -> None:
    weight = np.array([[8.0, -7.0, 3.0, 0.4]], np.float32) * np.float32(sign)
    linear = quantize_rtn(weight, 4, None)
    assert linear.values.tolist() == [[-8, 7, -3, 0]]
    assert linear.scales.tolist() == [[-1.0 * sign]]
    assert linear.dequantize()[0, 0] == weight[0, 0]


def test_int4_makes_room_where_both_signs_are_equally_large() -> None:
    weight = np.array([[7.5, -7.5, 1.0]], np.float32)
    linear = quantize_rtn(weight, 4, None)
    assert abs(float(linear.scales[0, 0])) == 1.0
    assert np.abs(linear.dequantize() - weight).max() == 0.5


def test_groups_are_independent() -> None:
    weight = random_weight(3, 12)
    whole = quantize_rtn(weight, 4, 4)
    for group in range(3):
        columns = slice(4 * group, 4 * group + 4)
        alone = quantize_rtn(np.ascontiguousarray(weight[:, columns]), 4, None)
        np.testing.assert_array_equal(whole.values[:, columns], alone.values)
        np.testing.assert_array_equal(whole.scales[:, [group]], alone.scales)


def test_result_does_not_depend_on_how_rows_are_cut_into_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = random_weight(50, 24)
    whole = quantize_rtn(weight, 4, 8)
    monkeypatch.setattr("llmserve.quant.groups._CHUNK", 24 * 7)
    chunked = quantize_rtn(weight, 4, 8)
    np.testing.assert_array_equal(whole.values, chunked.values)
    np.testing.assert_array_equal(whole.scales, chunked.scales)


@pytest.mark.parametrize("bits", BITS)
def test_zeros_stay_zero(bits: Literal[4, 8]) -> None:
    linear = quantize_rtn(np.zeros((2, 6), np.float32), bits, 3)
    assert not linear.scales.any()
    assert not linear.dequantize().any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_scales_are_numbers_of_the_stored_type(bits: Literal[4, 8], dtype: str) -> None:
    linear = quantize_rtn(random_weight(8, 32), bits, 16, scale_dtype=dtype)
    np.testing.assert_array_equal(to_float32(from_float32(linear.scales, dtype)), linear.scales)


@pytest.mark.parametrize("bits", BITS)
def test_quantizing_what_was_quantized_changes_nothing(bits: Literal[4, 8]) -> None:
    once = quantize_rtn(random_weight(16, 64), bits, 16)
    twice = quantize_rtn(once.dequantize(), bits, 16)
    np.testing.assert_allclose(twice.dequantize(), once.dequantize(), rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weight_that_is_not_finite_is_refused_by_name(value: float) -> None:
    weight = random_weight(4, 8)
    weight[2, 3] = value
    with pytest.raises(ExportError, match=r"model\.layers\.3\.mlp\.up_proj holds NaN"):
        quantize_rtn(weight, 8, None, name="model.layers.3.mlp.up_proj")


def test_weight_beyond_the_scales_type_is_refused_by_name() -> None:
    with pytest.raises(ExportError, match="q_proj holds a weight beyond the range of float16"):
        quantize_rtn(
            np.full((1, 4), 1e5, np.float32), 8, None, scale_dtype="float16", name="q_proj"
        )


@pytest.mark.parametrize("size", [0, 5, 24])
def test_group_size_that_does_not_divide_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"group size {size} does not divide the width 12"):
        quantize_rtn(random_weight(2, 12), 4, size)


def test_other_bits_are_refused() -> None:
    with pytest.raises(ConfigError, match="4 or 8 bits, not 3"):
        quantize_rtn(random_weight(2, 4), 3, None)  # type: ignore[arg-type]


def test_scales_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        QuantizedLinear(8, 4, np.zeros((2, 8), np.int8), np.zeros((2, 1), np.float32))
