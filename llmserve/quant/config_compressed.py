"""`quantization_config` of compressed-tensors: integer weights, with or without int8 activations.

Every setting that the decoders here would not honour is refused by name. Source: the package
compressed-tensors 0.20 (`QuantizationConfig`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from .layer_groups import LayerGroup, Packing, layer_names

__all__ = ["has_int8_cache", "parse_compressed", "render_compressed"]


_MIXED = "mixed-precision"
_FORMATS: tuple[Packing, ...] = ("pack-quantized", "int-quantized")
_INT8_BY_TOKEN = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "token",
    "dynamic": True,
}
# What the package takes an absent key for.
_DEFAULTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": None, "dynamic": False}


def render_compressed(
    groups: tuple[LayerGroup, ...], ignore: tuple[str, ...], *, has_int8_cache: bool
) -> dict[str, Any]:
    """The value of `quantization_config` in config.json."""
    formats = {group.packing for group in groups}
    rendered: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else _MIXED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": _render_group(group) for index, group in enumerate(groups)
        },
        "ignore": list(ignore),
        "kv_cache_scheme": dict(_INT8_BY_TOKEN) if has_int8_cache else None,
    }
    if len(groups) == 1 and groups[0].packing == "pack-quantized" and not groups[0].is_symmetric:
        # transformers 5.23 makes place for zero points that are not packed, unless it is told to
        # dequantize while it loads; there it takes one group's form for all layers.
        rendered["dequantize"] = True
    return rendered


def has_int8_cache(value: Mapping[str, Any]) -> bool:
    """Whether the folder asks for an int8 KV cache. Raises `ConfigError` for any other."""
    return _is_int8_by_token("quantization_config: kv_cache_scheme", value.get("kv_cache_scheme"))


def parse_compressed(value: Mapping[str, Any]) -> tuple[tuple[LayerGroup, ...], tuple[str, ...]]:
    """Groups and ignored names. Raises `ConfigError` for what is unknown."""
    for key in ("sparsity_config", "transform_config"):
        if value.get(key):
            raise ConfigError(f"quantization_config: {key} is not supported")
    if value.get("quantization_status", "compressed") != "compressed":
        raise ConfigError(
            f"quantization_config: status {value['quantization_status']!r}; "
            "only 'compressed' is read"
        )
    groups = tuple(
        _parse_group(name, group, group.get("format") or value.get("format"))
        for name, group in value["config_groups"].items()
    )
    return groups, layer_names(value.get("ignore") or [])


def _render_group(group: LayerGroup) -> dict[str, Any]:
    return {
        # Without its own format, compressed-tensors takes int8 weights for packed ones.
        "format": group.packing,
        "targets": list(group.targets),
        "weights": {
            "num_bits": group.bits,
            "type": "int",
            "symmetric": group.is_symmetric,
            "strategy": "channel" if group.group_size is None else "group",
            "group_size": group.group_size,
            "dynamic": False,
            **({"actorder": "group"} if group.has_order else {}),
        },
        "input_activations": dict(_INT8_BY_TOKEN) if group.has_int8_activations else None,
        "output_activations": None,
    }


def _parse_group(name: str, value: Mapping[str, Any], form: object) -> LayerGroup:
    weights = value["weights"]
    where = f"quantization_config: {name}"
    if value.get("output_activations"):
        raise ConfigError(f"{where}: quantized outputs are not supported")
    if weights.get("num_bits") not in (4, 8) or weights.get("type") != "int":
        raise ConfigError(
            f"{where}: {weights.get('num_bits')}-bit {weights.get('type')} weights; "
            "int of 4 or 8 bits are supported"
        )
    if form not in _FORMATS or (form == "int-quantized" and weights["num_bits"] == 4):
        raise ConfigError(
            f"{where}: format {form!r} for {weights['num_bits']}-bit weights; 'pack-quantized' is "
            "read, and for 8 bits 'int-quantized'"
        )
    if weights.get("dynamic"):
        raise ConfigError(f"{where}: only static weights are supported")
    return LayerGroup(
        bits=weights["num_bits"],
        group_size=_parse_size(where, weights),
        targets=layer_names(value["targets"]),
        packing=_FORMATS[_FORMATS.index(form)],
        is_symmetric=bool(weights.get("symmetric", True)),
        has_order=weights.get("actorder") in ("group", "dynamic"),
        has_int8_activations=_is_int8_by_token(
            f"{where}: input_activations", value.get("input_activations")
        ),
    )


def _parse_size(where: str, weights: Mapping[str, Any]) -> int | None:
    size = weights.get("group_size")
    if weights.get("strategy") == "channel":
        return None
    if weights.get("strategy") != "group" or type(size) is not int or size < 1:
        raise ConfigError(
            f"{where}: strategy {weights.get('strategy')!r} with group_size {size!r}; "
            "'group' with a positive size and 'channel' are supported"
        )
    return size


def _is_int8_by_token(where: str, value: Mapping[str, Any] | None) -> bool:
    """Whether something is int8 with a scale for each token; False: it is not quantized.

    Raises `ConfigError` for any other number.
    """
    if not value:
        return False
    found = {key: value.get(key, _DEFAULTS[key]) for key in _INT8_BY_TOKEN}
    wrong = {key: found[key] for key, wanted in _INT8_BY_TOKEN.items() if found[key] != wanted}
    if wrong:
        raise ConfigError(
            f"{where} {wrong}; symmetric int of 8 bits, made for each token (strategy 'token', "
            "dynamic), is supported"
        )
    return True
