"""The layout of packed layers, against the package compressed-tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmserve.errors import CheckpointError
from llmserve.quant.dtypes import StoredArray
from llmserve.quant.groups import quantize_rtn
from llmserve.quant.layer_groups import LayerGroup, Packing
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


def group(
    bits: Any, packing: Packing, *, size: int | None = None, is_symmetric: bool = True,
    has_order: bool = False,
) -> LayerGroup:  # fmt: skip
    return LayerGroup(
        bits=bits, group_size=size, targets=(), packing=packing, is_symmetric=is_symmetric,
        has_order=has_order,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "packing"), [(4, "pack-quantized"), (8, "pack-quantized"), (8, "int-quantized")]
)
@pytest.mark.parametrize("size", [None, 43])
def test_stored_tensors_are_those_announced_and_mean_the_same_to_compressed_tensors(
    bits: Any, packing: Packing, size: int | None, is_symmetric: bool
) -> None:
    weight = np.random.default_rng(0).standard_normal((6, 172)).astype(np.float32)
    linear = quantize_rtn(weight, bits, size, is_symmetric=is_symmetric)
    form = group(bits, packing, size=size, is_symmetric=is_symmetric)
    stored = to_stored(linear, form)
    specs = stored_specs((6, 172), form)
    assert stored.keys() == specs.keys()
    assert all(specs[name].accepts(array) for name, array in stored.items())
    back = from_stored(stored, (6, 172), form)
    np.testing.assert_array_equal(back.dequantize(), linear.dequantize())
    np.testing.assert_allclose(theirs(stored, form), linear.dequantize(), rtol=1e-6)


def theirs(stored: dict[str, StoredArray], form: LayerGroup) -> np.ndarray:
    """What the package makes of the tensors."""
    torch = pytest.importorskip("torch")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    arguments = QuantizationArgs(
        num_bits=form.bits, symmetric=form.is_symmetric, group_size=form.group_size,
        strategy="channel" if form.group_size is None else "group",
    )  # fmt: skip
    compressor = compressors.BaseCompressor.get_value_from_registry(form.packing)
    tensors = {name: torch.tensor(array.data) for name, array in stored.items()}
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    weight = compressor.decompress(tensors, scheme)["weight"]
    return np.asarray(weight.numpy())


def test_order_of_inputs_says_each_inputs_group() -> None:
    form = group(4, "pack-quantized", size=4, has_order=True)
    weight = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    linear = quantize_rtn(weight, 4, 4)
    index = np.array([0, 1, 1, 0, 1, 0, 1, 0], np.int32)
    stored = {**to_stored(linear, form), "weight_g_idx": StoredArray("int32", index)}
    found = from_stored(stored, (3, 8), form).dequantize()
    np.testing.assert_array_equal(found, linear.values * linear.scales[:, index])
    index[:] = -1
    assert from_stored(stored, (3, 8), form).group_of_input is None
    index[3] = 2
    with pytest.raises(CheckpointError, match=r"group is -1\.\.2; there are 2"):
        from_stored(stored, (3, 8), form)


def test_scale_that_is_not_finite_is_refused() -> None:
    form = group(8, "int-quantized")
    stored = to_stored(quantize_rtn(np.ones((2, 4), np.float32), 8, None), form)
    stored["weight_scale"].data[1] = np.nan
    with pytest.raises(CheckpointError, match="weight_scale holds NaN"):
        from_stored(stored, (2, 4), form)


def test_shape_that_is_another_is_refused() -> None:
    form = group(4, "pack-quantized")
    stored = to_stored(quantize_rtn(np.ones((2, 8), np.float32), 4, None), form)
    stored["weight_shape"].data[0] = 3
    with pytest.raises(CheckpointError, match="weight_shape says"):
        from_stored(stored, (2, 8), form)
