"""Number types in numpy, against torch for every bfloat16 there is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmserve.quant.dtypes import StoredArray, TensorSpec, from_float32, to_float32

ALL_16_BITS = np.arange(1 << 16, dtype=np.uint16)


def torch_bfloat16(values: np.ndarray) -> np.ndarray:
    rounded = torch.from_numpy(values).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


def test_every_bfloat16_widens_as_torch_does() -> None:
    widened = to_float32(StoredArray("bfloat16", ALL_16_BITS))
    oracle = torch.from_numpy(ALL_16_BITS.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(widened.view(np.uint32), oracle.view(np.uint32))


def test_every_bfloat16_survives_the_way_there_and_back() -> None:
    widened = to_float32(StoredArray("bfloat16", ALL_16_BITS))
    back = from_float32(widened, "bfloat16").data
    is_nan = np.isnan(widened)
    np.testing.assert_array_equal(back[~is_nan], ALL_16_BITS[~is_nan])
    assert np.isnan(to_float32(StoredArray("bfloat16", back[is_nan]))).all()


def test_float32_rounds_to_bfloat16_as_torch_does() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    ties = (np.arange(4096, dtype=np.uint32) << np.uint32(16)) | np.uint32(0x8000)
    special = np.array([0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 1, 0x80000000], np.uint32)
    values = np.concatenate([bits, ties, special]).view(np.float32)
    values = values[~np.isnan(values)]
    np.testing.assert_array_equal(from_float32(values, "bfloat16").data, torch_bfloat16(values))


def test_nan_stays_nan_when_its_payload_is_in_the_lost_half() -> None:
    nans = np.array([0x7F800001, 0xFF80FFFF, 0x7FFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(to_float32(from_float32(nans, "bfloat16"))).all()


def test_float16_beyond_its_range_becomes_infinite() -> None:
    stored = from_float32(np.array([65504.0, 1e6, -1e6, 1e-9], np.float32), "float16")
    np.testing.assert_array_equal(to_float32(stored), [65504.0, np.inf, -np.inf, 0.0])


def test_float32_is_not_copied() -> None:
    values = np.ones(3, np.float32)
    assert to_float32(StoredArray("float32", values)) is values


def test_array_that_cannot_carry_the_type_is_refused() -> None:
    with pytest.raises(ValueError, match="bfloat16 is carried by uint16"):
        StoredArray("bfloat16", np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="unknown dtype 'float8'"):
        StoredArray("float8", np.zeros(2, np.float32))


def test_integers_are_no_floats() -> None:
    with pytest.raises(ValueError, match="int8"):
        to_float32(StoredArray("int8", np.zeros(2, np.int8)))
    with pytest.raises(ValueError, match="int8"):
        from_float32(np.zeros(2, np.float32), "int8")


@pytest.mark.parametrize(
    ("dtypes", "shape", "is_accepted"),
    [
        (("float32",), (2, 3), True),
        (("float16", "float32"), (2, None), True),
        (("float16",), (2, 3), False),
        (("float32",), (3, 2), False),
        (("float32",), (2, 3, 1), False),
    ],
)
def test_spec_accepts_type_and_shape(
    dtypes: tuple[str, ...], shape: tuple[int | None, ...], is_accepted: bool
) -> None:
    array = StoredArray("float32", np.zeros((2, 3), np.float32))
    assert TensorSpec(dtypes, shape).accepts(array) is is_accepted
