"""A model folder's quantized linear layers: which tensors hold one, and one from those tensors.

The one place where the two stored forms (compressed-tensors' and bitsandbytes') meet, so that
`checkpoint.py` reads and writes layers without knowing either.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import CheckpointError, ConfigError
from . import bnb, packing
from .bnb import BitsAndBytesLinear
from .config import LayerGroup, QuantizationConfig
from .dtypes import StoredArray, TensorSpec
from .groups import Bits, QuantizedLinear

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
        group = _group(config, layer, shape)
        specs = packing.stored_specs(shape, group.bits, group.group_size)
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
        return packing.from_stored(parts, shape, group.bits, group.group_size)
    except CheckpointError as error:
        raise CheckpointError(f"layer {layer}: {error}") from error


def encode_layer(layer: str, linear: AnyQuantizedLinear) -> dict[str, StoredArray]:
    """The tensors that hold the weight of `layer` (its name without `.weight`)."""
    if isinstance(linear, BitsAndBytesLinear):
        parts = dict(linear.tensors)
    else:
        parts = packing.to_stored(linear)
    return {f"{layer}.{part}": array for part, array in parts.items()}


def config_of(
    layers: Mapping[str, AnyQuantizedLinear], unquantized: tuple[str, ...]
) -> QuantizationConfig:
    """The configuration that describes these layers, by name without `.weight`.

    Args:
        layers: the quantized ones. All of one method, width of integers and bitsandbytes format.
        unquantized: linear layers that stay as they are; `lm_head` needs no mention.
    """
    ignore = ("lm_head", *(name for name in unquantized if name != "lm_head"))
    forms = {linear.form for linear in layers.values() if isinstance(linear, BitsAndBytesLinear)}
    if forms:
        if len(forms) > 1 or any(isinstance(layer, QuantizedLinear) for layer in layers.values()):
            raise ConfigError("layers of two quantization formats cannot be in one folder")
        return QuantizationConfig(bitsandbytes=forms.pop(), ignore=ignore)
    members: dict[tuple[Bits, int | None], list[str]] = {}
    for name, linear in layers.items():
        if isinstance(linear, QuantizedLinear):
            members.setdefault((linear.bits, linear.group_size), []).append(name)
    groups = tuple(
        LayerGroup(bits=bits, group_size=size, targets=tuple(names))
        for (bits, size), names in members.items()
    )
    return QuantizationConfig(groups=groups, ignore=ignore)


def _group(config: QuantizationConfig, layer: str, shape: tuple[int, int]) -> LayerGroup:
    group = config.group_of(layer)
    if group is None:
        raise CheckpointError(f"layer {layer} is in no group of quantization_config")
    if group.group_size is not None and shape[1] % group.group_size:
        raise CheckpointError(
            f"layer {layer}: group size {group.group_size} does not divide its width {shape[1]}"
        )
    return group
