"""Layers to named tensors and back, for both stored forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmserve.errors import CheckpointError
from llmserve.quant.config import QuantizationConfig
from llmserve.quant.dtypes import StoredArray
from llmserve.quant.groups import QuantizedLinear, quantize_rtn
from llmserve.quant.layout import config_of, decode_layer, encode_layer, layer_specs

NAME = "model.layers.0.mlp.up_proj"


def linear(
    out: int = 4, width: int = 12, *, bits: Any = 4, size: int | None = 6
) -> QuantizedLinear:
    weight = np.random.default_rng(out * width).standard_normal((out, width)).astype(np.float32)
    return quantize_rtn(weight, bits, size)


@pytest.fixture
def stored() -> tuple[QuantizationConfig, dict[str, StoredArray]]:
    layer = linear()
    return config_of({NAME: layer}, ()), encode_layer(NAME, layer)


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_layer_comes_back(bits: Any, is_symmetric: bool) -> None:
    weight = np.random.default_rng(0).standard_normal((13, 12)).astype(np.float32) + 0.5
    layer = quantize_rtn(weight, bits, 6, is_symmetric=is_symmetric)
    assert (layer.zeros is None) is is_symmetric
    config = config_of({NAME: layer}, ())
    back = decode_layer(config, NAME, layer.shape, encode_layer(NAME, layer))
    np.testing.assert_array_equal(back.dequantize(), layer.dequantize())


def test_layer_that_is_not_quantized_has_no_specs() -> None:
    config = config_of({NAME: linear()}, ())
    assert layer_specs(config, "model.layers.0.mlp.down_proj", (4, 12)) is None
    with pytest.raises(CheckpointError, match="down_proj is not quantized"):
        decode_layer(config, "model.layers.0.mlp.down_proj", (4, 12), {})


def test_each_group_size_has_its_own_group() -> None:
    layers = {"a": linear(size=6), "b": linear(size=None), "c": linear(size=6)}
    groups = config_of(layers, ()).groups
    assert [(group.group_size, group.targets) for group in groups] == [
        (6, ("a", "c")),
        (None, ("b",)),
    ]


def test_head_is_always_ignored_and_named_once() -> None:
    assert config_of({NAME: linear()}, ("lm_head", "x")).ignore == ("lm_head", "x")


def test_missing_tensor_is_named(stored: Any) -> None:
    config, tensors = stored
    del tensors[f"{NAME}.weight_scale"]
    with pytest.raises(CheckpointError, match=f"tensor {NAME}.weight_scale is missing"):
        decode_layer(config, NAME, (4, 12), tensors)


def test_tensor_of_another_type_or_shape_is_named(stored: Any) -> None:
    config, tensors = stored
    wrong = StoredArray("int32", np.zeros((4, 1), np.int32))
    with pytest.raises(
        CheckpointError, match=r"weight_packed is int32 \[4, 1\], expected int32 \[4, 2\]"
    ):
        decode_layer(config, NAME, (4, 12), tensors | {f"{NAME}.weight_packed": wrong})


def test_contents_that_are_wrong_name_the_layer(stored: Any) -> None:
    config, tensors = stored
    tensors[f"{NAME}.weight_scale"].data[0, 0] = np.inf
    with pytest.raises(CheckpointError, match=f"layer {NAME}: weight_scale holds NaN"):
        decode_layer(config, NAME, (4, 12), tensors)


def test_group_size_that_does_not_divide_names_the_layer(stored: Any) -> None:
    config, tensors = stored
    with pytest.raises(CheckpointError, match="group size 6 does not divide its width 13"):
        decode_layer(config, NAME, (4, 13), tensors)


def test_layers_of_two_widths_of_integers_are_two_groups() -> None:
    layers = {"a": linear(bits=4), "b": linear(bits=8)}
    config = config_of(layers, ())
    assert config.render()["format"] == "mixed-precision"
    for name, layer in layers.items():
        back = decode_layer(config, name, layer.shape, encode_layer(name, layer))
        np.testing.assert_array_equal(back.dequantize(), layer.dequantize())
