"""A model folder's quantized linear layers: which tensors hold one, and one from those tensors.

The one place where the stored forms (compressed-tensors', bitsandbytes', GPTQ's and AWQ's) meet, so
that `checkpoint.py` reads and writes layers without knowing any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..errors import CheckpointError, ConfigError
from . import bnb, packing
from .bnb import BitsAndBytesLinear
from .config import LayerGroup, QuantizationConfig
from .dtypes import StoredArray, TensorSpec
from .groups import QuantizedLinear
from .packing_published import from_published, published_specs

__all__ = ["AnyQuantizedLinear", "config_of", "decode_layer", "encode_layer", "layer_specs"]

AnyQuantizedLinear = QuantizedLinear | BitsAndBytesLinear
"""A quantized linear layer: both kinds have `shape` and `dequantize()`."""


def layer_specs(
    config: QuantizationConfig, layer: str, shape: tuple[int, int]
) -> dict[str, TensorSpec] | None:
    """Names, types and shapes of the tensors that hold the weight of `layer`, [out, in].

    None for a layer that is not quantized. `layer` is the weight's name without `.weight`.

    Raises `CheckpointError` for a group size that does not divide the width.
    """
    if not config.is_quantized(layer):
        return None
    if config.bitsandbytes is not None:
        specs = bnb.stored_specs(shape, config.bitsandbytes)
    else:
        specs = _group_specs(layer, _group(config, layer, shape), shape)
    return {f"{layer}.{part}": spec for part, spec in specs.items()}


def decode_layer(
    config: QuantizationConfig,
    layer: str,
    shape: tuple[int, int],
    tensors: Mapping[str, StoredArray],
) -> AnyQuantizedLinear:
    """The quantized weight of `layer` from the tensors that `layer_specs` names.

    Raises `CheckpointError` for a missing tensor, a wrong type or shape, or wrong contents.
    """
    specs = layer_specs(config, layer, shape)
    if specs is None:
        raise CheckpointError(f"layer {layer} is not quantized")
    parts: dict[str, StoredArray] = {}
    for name, spec in specs.items():
        if name not in tensors:
            raise CheckpointError(f"tensor {name} is missing")
        if not spec.accepts(tensors[name]):
            array = tensors[name]
            raise CheckpointError(
                f"tensor {name} is {array.dtype} {list(array.shape)}, expected {spec}"
            )
        parts[name.removeprefix(f"{layer}.")] = tensors[name]
    try:
        if config.bitsandbytes is not None:
            return bnb.from_stored(parts, shape, config.bitsandbytes)
        group = _group(config, layer, shape)
        read = from_published if group.packing in _PUBLISHED else packing.from_stored
        return read(parts, shape, group)
    except CheckpointError as error:
        raise CheckpointError(f"layer {layer}: {error}") from error


def encode_layer(layer: str, linear: AnyQuantizedLinear) -> dict[str, StoredArray]:
    """The tensors that hold the weight of `layer` (its name without `.weight`)."""
    if isinstance(linear, BitsAndBytesLinear):
        parts = dict(linear.tensors)
    else:
        parts = packing.to_stored(linear, _form_of(linear, has_int8_activations=False))
    return {f"{layer}.{part}": array for part, array in parts.items()}


def config_of(
    layers: Mapping[str, AnyQuantizedLinear],
    unquantized: tuple[str, ...],
    *,
    has_int8_activations: bool = False,
    has_int8_cache: bool = False,
) -> QuantizationConfig:
    """The configuration that describes these layers, by name without `.weight`.

    Args:
        layers: the quantized ones. All of one method; bitsandbytes': all of one format.
        unquantized: linear layers that stay as they are; `lm_head` needs no mention.
        has_int8_activations: whether int8 layers ask for int8 activations (W8A8).
        has_int8_cache: whether keys and values are to be kept as int8.

    Raises `ConfigError` for layers that no one folder can hold.
    """
    ignore = ("lm_head", *(name for name in unquantized if name != "lm_head"))
    forms = {linear.form for linear in layers.values() if isinstance(linear, BitsAndBytesLinear)}
    if forms:
        if len(forms) > 1 or any(isinstance(layer, QuantizedLinear) for layer in layers.values()):
            raise ConfigError("layers of two quantization formats cannot be in one folder")
        if has_int8_cache:
            raise ConfigError("bitsandbytes' folders cannot ask for an int8 KV cache")
        return QuantizationConfig(bitsandbytes=forms.pop(), ignore=ignore)
    members: dict[LayerGroup, list[str]] = {}
    for name, linear in layers.items():
        if isinstance(linear, QuantizedLinear):
            form = _form_of(linear, has_int8_activations=has_int8_activations)
            members.setdefault(form, []).append(name)
    groups = tuple(replace(form, targets=tuple(names)) for form, names in members.items())
    return QuantizationConfig(groups=groups, ignore=ignore, has_int8_cache=has_int8_cache)


_PUBLISHED = ("gptq", "gptq_v2", "awq")


def _form_of(linear: QuantizedLinear, *, has_int8_activations: bool) -> LayerGroup:
    """The group that describes a layer as it is written, without a target yet."""
    return LayerGroup(
        bits=linear.bits,
        group_size=linear.group_size,
        targets=(),
        packing="int-quantized" if linear.bits == 8 else "pack-quantized",
        is_symmetric=linear.zeros is None,
        has_order=linear.group_of_input is not None,
        has_int8_activations=has_int8_activations and linear.bits == 8,
    )


def _group_specs(layer: str, group: LayerGroup, shape: tuple[int, int]) -> dict[str, TensorSpec]:
    if group.packing not in _PUBLISHED:
        return packing.stored_specs(shape, group)
    try:
        return published_specs(shape, group)
    except CheckpointError as error:
        raise CheckpointError(f"layer {layer}: {error}") from error


def _group(config: QuantizationConfig, layer: str, shape: tuple[int, int]) -> LayerGroup:
    group = config.group_of(layer)
    if group is None:
        raise CheckpointError(f"layer {layer} is in no group of quantization_config")
    is_whole = group.group_size is None or shape[1] % group.group_size == 0
    if group.packing not in _PUBLISHED and not is_whole:
        raise CheckpointError(
            f"layer {layer}: group size {group.group_size} does not divide its width {shape[1]}"
        )
    return group
