"""The layout of packed layers, against the package compressed-tensors."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve.errors import CheckpointError
from llmserve.quant.groups import quantize_rtn
from llmserve.quant.packing import from_stored, pack_int4, stored_specs, to_stored, unpack_int4

WIDTHS = [1, 7, 8, 9, 43, 48, 105, 172]


def integers(width: int) -> np.ndarray:
    return np.random.default_rng(width).integers(-8, 8, (5, width)).astype(np.int8)


@pytest.mark.parametrize("width", WIDTHS)
def test_packing_loses_nothing(width: int) -> None:
    values = integers(width)
    np.testing.assert_array_equal(unpack_int4(pack_int4(values), width), values)


def test_first_integer_is_in_the_lowest_bits() -> None:
    values = np.array([[-8, -7, -6, -5, -4, -3, -2, -1]], np.int8)
    assert pack_int4(values).tolist() == [[0x76543210]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("width", WIDTHS)
def test_packed_words_are_those_of_compressed_tensors(width: int) -> None:
    torch = pytest.importorskip("torch")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    values = integers(width)
    packed = pack_int4(values)
    oracle = helpers.pack_to_int32(torch.from_numpy(values), 4)
    np.testing.assert_array_equal(packed, oracle.numpy())
    np.testing.assert_array_equal(
        helpers.unpack_from_int32(torch.from_numpy(packed), 4, (5, width)).numpy(), values
    )


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (8, 43), (4, None), (4, 43)])
def test_stored_tensors_are_those_announced(bits: int, group_size: int | None) -> None:
    weight = np.random.default_rng(0).standard_normal((6, 172)).astype(np.float32)
    linear = quantize_rtn(weight, bits, group_size, scale_dtype="bfloat16")  # type: ignore[arg-type]
    stored = to_stored(linear)
    specs = stored_specs((6, 172), linear.bits, group_size)
    assert list(stored) == list(specs)
    assert all(specs[name].accepts(array) for name, array in stored.items())
    back = from_stored(stored, (6, 172), linear.bits, group_size)
    np.testing.assert_array_equal(back.dequantize(), linear.dequantize())


def test_scale_that_is_not_finite_is_refused() -> None:
    stored = to_stored(quantize_rtn(np.ones((2, 4), np.float32), 8, None))
    stored["weight_scale"].data[1] = np.nan
    with pytest.raises(CheckpointError, match="weight_scale holds NaN"):
        from_stored(stored, (2, 4), 8, None)


def test_recorded_shape_that_is_another_is_refused() -> None:
    stored = to_stored(quantize_rtn(np.ones((2, 4), np.float32), 4, None))
    stored["weight_shape"].data[1] = 5
    with pytest.raises(CheckpointError, match=r"weight_shape says \(2, 5\), expected \(2, 4\)"):
        from_stored(stored, (2, 4), 4, None)
