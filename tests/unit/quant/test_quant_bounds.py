"""R29: what rounding to nearest promises of each weight, on matrices that try to break it."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from llmserve.quant.config import LayerGroup
from llmserve.quant.dtypes import FLOAT_DTYPES
from llmserve.quant.groups import QuantizedLinear, quantize_rtn
from llmserve.quant.packing import from_stored, to_stored

SHAPES = [(3, 8, 4), (5, 48, 16), (4, 172, 43), (6, 288, 32), (2, 172, None), (1, 1, None)]
"""Outputs, inputs, group size."""


def adversarial(out: int, width: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(29)
    plain = random.standard_normal((out, width)).astype(np.float32)
    outlier = plain.copy()
    outlier[0, width // 2] = 1e4
    mixed = plain * np.float32(10.0) ** random.integers(-30, 30, (out, width)).astype(np.float32)
    return {
        "zero": np.zeros_like(plain),
        "outlier": outlier,
        "subnormal": plain * np.float32(1e-42),
        "constant rows": np.repeat(plain[:, :1], width, axis=1),
        "one sign": np.abs(plain) + 1,
        "zero row": np.where(np.arange(out)[:, None] == 0, 0, plain).astype(np.float32),
        "all magnitudes": mixed,
        "large": plain * np.float32(1e30),
    }


def within_half_a_step(linear: QuantizedLinear, weight: np.ndarray) -> np.ndarray:
    """Which weights [out, in] are where they must be, in exact arithmetic."""
    size = linear.group_size or weight.shape[1]
    scales = linear.scales.astype(np.float64).repeat(size, axis=1)
    zeros = 0 if linear.zeros is None else linear.zeros.repeat(size, axis=1)
    within: np.ndarray = (
        np.abs(weight - (linear.values.astype(np.float64) - zeros) * scales) <= np.abs(scales) / 2
    )
    return within


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_r29_every_weight_is_within_half_a_step(
    bits: Literal[4, 8], is_symmetric: bool, dtype: str
) -> None:
    for out, width, size in SHAPES:
        for name, weight in adversarial(out, width).items():
            if dtype == "float16" and np.abs(weight).max() > 65_504:
                continue  # refused, as another test shows
            linear = quantize_rtn(weight, bits, size, is_symmetric=is_symmetric, scale_dtype=dtype)
            assert within_half_a_step(linear, weight).all(), (name, out, width, size)
            assert np.isfinite(linear.dequantize()).all(), (name, out, width, size)


@pytest.mark.parametrize("bits", [4, 8])
def test_weight_one_step_off_is_beyond(bits: Literal[4, 8]) -> None:
    weight = adversarial(4, 48)["one sign"]
    linear = quantize_rtn(weight, bits, 16)
    linear.values[2, 7] += 1 if linear.values[2, 7] < 0 else -1
    found = within_half_a_step(linear, weight)
    assert np.argwhere(~found).tolist() == [[2, 7]]


@pytest.mark.parametrize("bits", [4, 8])
def test_scale_that_changed_is_beyond(bits: Literal[4, 8]) -> None:
    weight = adversarial(4, 48)["outlier"]
    linear = quantize_rtn(weight, bits, 16)
    linear.scales[1, 1] *= np.float32(1.5)
    assert not within_half_a_step(linear, weight)[1, 16:32].all()
    assert within_half_a_step(linear, weight)[[0, 2, 3]].all()


@pytest.mark.parametrize("bits", [4, 8])
def test_r29_packing_gives_back_the_same_integers(bits: Literal[4, 8]) -> None:
    for out, width, size in SHAPES[:4]:
        linear = quantize_rtn(adversarial(out, width)["outlier"], bits, size)
        packing = "int-quantized" if bits == 8 else "pack-quantized"
        group = LayerGroup(bits=bits, group_size=size, targets=(), packing=packing)
        found = from_stored(to_stored(linear, group), (out, width), group)
        np.testing.assert_array_equal(found.values, linear.values)
        np.testing.assert_array_equal(found.scales, linear.scales)
