"""R29: the stated error bound, on random and adversarial matrices of every stored type."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.quant.dtypes import FLOAT_DTYPES, Float32Array, from_float32, to_float32
from llmserve.quant.groups import INTEGER_RANGE, QuantizedLinear, quantize_rtn
from llmserve.quant.layout import config_of, decode_layer, encode_layer

LARGEST = {"float32": 3.4028235e38, "bfloat16": 3.3895314e38, "float16": 65504.0}


def check_bound(weight: Float32Array, linear: QuantizedLinear) -> None:
    """Half a step is the most, exactly; and the float32 product rounds once."""
    low, high = INTEGER_RANGE[linear.bits]
    assert linear.values.min() >= low
    assert linear.values.max() <= high
    groups = linear.scales.shape[1]
    scales = np.repeat(linear.scales.astype(np.float64), weight.shape[1] // groups, axis=1)
    integers = linear.values.astype(np.float64)
    if linear.zeros is not None:
        integers -= np.repeat(linear.zeros, weight.shape[1] // groups, axis=1)
    exact = integers * scales  # 8 bits times 24 bits: exact in float64
    assert (np.abs(weight.astype(np.float64) - exact) <= np.abs(scales) / 2).all()
    product = linear.dequantize()
    assert np.isfinite(product).all()
    tiny = 2.0**-150  # half the smallest float32, where products are denormal
    assert (np.abs(product - exact) <= np.abs(exact) * 2.0**-24 + tiny).all()


@st.composite
def matrices(draw: st.DrawFn, dtype: str) -> Float32Array:
    """Weights of every magnitude that the type holds: rows of zeros, denormals, lone outliers."""
    seed = draw(st.integers(0, 2**32 - 1))
    out, width = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 5, 8, 43, 48, 105, 172]))
    random = np.random.default_rng(seed)
    powers = st.integers(-24, 15) if dtype == "float16" else st.integers(-149, 127)
    scale = np.array([2.0 ** draw(powers) for _ in range(out)])[:, None]
    weight = random.standard_normal((out, width)) * scale
    if draw(st.booleans()):
        weight[draw(st.integers(0, out - 1))] = 0.0
    if draw(st.booleans()):
        outlier = draw(st.sampled_from([1e4, -1e4, 1e30, -1e30, LARGEST[dtype], -LARGEST[dtype]]))
        weight[draw(st.integers(0, out - 1)), draw(st.integers(0, width - 1))] = outlier
    clipped = np.clip(weight, -LARGEST[dtype], LARGEST[dtype]).astype(np.float32)
    return to_float32(from_float32(clipped, dtype))


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@settings(max_examples=90, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_weight_is_within_half_a_step(
    data: st.DataObject, bits: Literal[4, 8], dtype: str, is_symmetric: bool
) -> None:
    weight = data.draw(matrices(dtype))
    width = weight.shape[1]
    divisors = [None, *(size for size in range(1, width + 1) if width % size == 0)]
    size = data.draw(st.sampled_from(divisors))
    check_bound(
        weight, quantize_rtn(weight, bits, size, is_symmetric=is_symmetric, scale_dtype=dtype)
    )


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_bound_holds_at_the_end_of_the_type(
    bits: Literal[4, 8], dtype: str, is_symmetric: bool
) -> None:
    largest = LARGEST[dtype]
    shares = np.array([1.0, 0.999, 0.996, 0.97, 0.94, 0.9375, 0.93, 0.88, 0.875, 0.5])
    rows = [
        [sign * share * largest, -sign * other * largest, 0.0, largest * 1e-3]
        for sign in (1, -1)
        for share in shares
        for other in shares
    ]
    weight = to_float32(from_float32(np.array(rows, np.float32), dtype))
    assert np.isfinite(weight).all()
    check_bound(
        weight, quantize_rtn(weight, bits, None, is_symmetric=is_symmetric, scale_dtype=dtype)
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    out=st.integers(1, 5),
    width=st.integers(1, 70),
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([4, 8]),
    dtype=st.sampled_from(FLOAT_DTYPES),
    is_symmetric=st.booleans(),
)
def test_what_is_stored_comes_back_bit_for_bit(
    out: int, width: int, seed: int, bits: Literal[4, 8], dtype: str, is_symmetric: bool
) -> None:
    weight = np.random.default_rng(seed).standard_normal((out, width)).astype(np.float32)
    linear = quantize_rtn(weight, bits, None, is_symmetric=is_symmetric, scale_dtype=dtype)
    config = config_of({"layer": linear}, ())
    back = decode_layer(config, "layer", (out, width), encode_layer("layer", linear))
    assert isinstance(back, QuantizedLinear)
    np.testing.assert_array_equal(back.values, linear.values)
    np.testing.assert_array_equal(back.scales, linear.scales)
    np.testing.assert_array_equal(back.dequantize(), linear.dequantize())
    assert back.scale_dtype == dtype
