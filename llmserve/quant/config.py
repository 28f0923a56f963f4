"""How a model folder says that its weights are quantized: `quantization_config` of config.json.

Two methods are read and written: compressed-tensors (int4 and int8 weights, floating-point
activations) and bitsandbytes (NF4, FP4, LLM.int8). Everything else is refused by name, as is every
setting of these two that the decoders here would not honour. Source: the packages
compressed-tensors 0.20 (`QuantizationConfig`) and transformers 5 (`BitsAndBytesConfig`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ConfigError
from .bnb import BitsAndBytesFormat
from .groups import Bits

__all__ = ["LayerGroup", "QuantizationConfig"]

_FORMATS: dict[int, str] = {4: "pack-quantized", 8: "int-quantized"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Layers of one group size (compressed-tensors: one entry of `config_groups`)."""

    bits: Bits
    """Bits per integer."""
    group_size: int | None
    """Inputs that share a scale; None: one scale per output row."""
    targets: tuple[str, ...]
    """Layer names without `.weight`, `re:` patterns, or `Linear` for every linear layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationConfig:
    """Which layers are quantized and how. Exactly one of the two methods is set."""

    groups: tuple[LayerGroup, ...] = ()
    """compressed-tensors: the groups. A layer's name goes before a pattern, that before Linear."""
    bitsandbytes: BitsAndBytesFormat | None = None
    """bitsandbytes: its format; every linear layer that is not ignored has it."""
    ignore: tuple[str, ...] = ("lm_head",)
    """Layers that stay as they are: names, `re:` patterns, or (bitsandbytes) parts of names."""

    def __post_init__(self) -> None:
        if bool(self.groups) == (self.bitsandbytes is not None):
            raise ConfigError("quantization_config: either groups of layers or bitsandbytes")
        if len({group.bits for group in self.groups}) > 1:
            raise ConfigError(
                "quantization_config: layers of 4 and of 8 bits in one folder are not supported"
            )

    @property
    def method(self) -> Literal["compressed-tensors", "bitsandbytes"]:
        """Name of the method in config.json."""
        return "bitsandbytes" if self.bitsandbytes else "compressed-tensors"

    @property
    def scheme(self) -> str:
        """Short name of the form on disk: int8, int4, nf4, fp4 or bnb-int8."""
        if self.bitsandbytes is not None:
            return self.bitsandbytes.kind if self.bitsandbytes.kind != "int8" else "bnb-int8"
        return f"int{self.groups[0].bits}"

    def is_quantized(self, layer: str) -> bool:
        """Whether the linear layer of that name (no `.weight` at its end) is quantized."""
        if self.bitsandbytes is not None:
            return not any(_is_skipped(part, layer) for part in self.ignore)
        return self.group_of(layer) is not None

    def group_of(self, layer: str) -> LayerGroup | None:
        """The compressed-tensors group of a layer; None for a layer that is not quantized."""
        if any(matches(target, layer) for matches in _MATCHERS for target in self.ignore):
            return None
        for matches in _MATCHERS:
            for group in self.groups:
                if any(matches(target, layer) for target in group.targets):
                    return group
        return None

    def render(self) -> dict[str, Any]:
        """The value of `quantization_config` in config.json."""
        if self.bitsandbytes is not None:
            return _render_bitsandbytes(self.bitsandbytes, self.ignore)
        return {
            "quant_method": "compressed-tensors",
            "format": _FORMATS[self.groups[0].bits],
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{index}": _render_group(group) for index, group in enumerate(self.groups)
            },
            "ignore": list(self.ignore),
            "kv_cache_scheme": None,
        }

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> QuantizationConfig:
        """Read `quantization_config` of a config.json. Raises `ConfigError` for what is unknown."""
        method = value.get("quant_method")
        try:
            if method == "compressed-tensors":
                return _parse_compressed_tensors(value)
            if method == "bitsandbytes":
                return _parse_bitsandbytes(value)
        except (KeyError, TypeError, AttributeError, re.error) as error:
            raise ConfigError(f"quantization_config is malformed: {error}") from error
        raise ConfigError(
            f"quantization_config: method {method!r} is not supported; "
            "compressed-tensors and bitsandbytes are"
        )


# Patterns of strangers' files: few wildcards and no repeated groups, so that matching stays quick.
_SAFE_PATTERN = re.compile(r"(?:\.\*|\\d\+|\\\.|[\w.$^|()-])*", re.ASCII)
_MAX_WILDCARDS = 4


def _names(value: object) -> tuple[str, ...]:
    """Names and `re:` patterns of a list in config.json. Raises `ConfigError` for anything else."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"quantization_config: a list of layer names is needed, got {value!r}")
    for name in value:
        pattern = name.removeprefix("re:")
        wildcards = pattern.count("*") + pattern.count("+")
        if not _SAFE_PATTERN.fullmatch(pattern) or wildcards > _MAX_WILDCARDS:
            raise ConfigError(f"quantization_config: layer pattern {name!r} is not supported")
        re.compile(pattern)
    return tuple(value)


def _is_name(target: str, layer: str) -> bool:
    return target == layer


def _is_pattern(target: str, layer: str) -> bool:
    return target.startswith("re:") and re.match(target[3:], layer) is not None


def _is_class(target: str, layer: str) -> bool:
    return target == "Linear"


# In the order that compressed-tensors looks: the most specific first.
_MATCHERS = (_is_name, _is_pattern, _is_class)


def _is_skipped(part: str, layer: str) -> bool:
    """transformers' rule for `llm_int8_skip_modules`: a whole name, its beginning or its end."""
    return layer == part or layer.startswith(f"{part}.") or layer.endswith(f".{part}")


def _render_group(group: LayerGroup) -> dict[str, Any]:
    # Without its own format, compressed-tensors takes int8 weights for packed ones.
    own_format = {"format": _FORMATS[8]} if group.bits == 8 else {}
    return {
        **own_format,
        "targets": list(group.targets),
        "weights": {
            "num_bits": group.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "channel" if group.group_size is None else "group",
            "group_size": group.group_size,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
    }


def _render_bitsandbytes(form: BitsAndBytesFormat, ignore: tuple[str, ...]) -> dict[str, Any]:
    is_8bit = form.kind == "int8"
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": not is_8bit,
        "_load_in_8bit": is_8bit,
        "load_in_4bit": not is_8bit,
        "load_in_8bit": is_8bit,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": list(ignore),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_quant_type": "fp4" if is_8bit else form.kind,
        "bnb_4bit_use_double_quant": form.double_quant,
        "bnb_4bit_compute_dtype": form.compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
    }


def _parse_compressed_tensors(value: Mapping[str, Any]) -> QuantizationConfig:
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
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
    return QuantizationConfig(groups=groups, ignore=_names(value.get("ignore") or []))


def _parse_group(name: str, value: Mapping[str, Any], form: object) -> LayerGroup:
    weights = value["weights"]
    where = f"quantization_config: {name}"
    if value.get("input_activations") or value.get("output_activations"):
        raise ConfigError(f"{where}: quantized activations are not supported")
    if weights.get("num_bits") not in _FORMATS or weights.get("type") != "int":
        raise ConfigError(
            f"{where}: {weights.get('num_bits')}-bit {weights.get('type')} weights; "
            "int of 4 or 8 bits are supported"
        )
    if form != _FORMATS[weights["num_bits"]]:
        raise ConfigError(
            f"{where}: format {form!r} for {weights['num_bits']}-bit weights; "
            f"{_FORMATS[weights['num_bits']]!r} is read"
        )
    if not weights.get("symmetric", True) or weights.get("dynamic"):
        raise ConfigError(f"{where}: only symmetric, static weights are supported")
    size = weights.get("group_size")
    if weights.get("strategy") == "channel":
        size = None
    elif weights.get("strategy") != "group" or type(size) is not int or size < 1:
        raise ConfigError(
            f"{where}: strategy {weights.get('strategy')!r} with group_size {size!r}; "
            "'group' with a positive size and 'channel' are supported"
        )
    return LayerGroup(bits=weights["num_bits"], group_size=size, targets=_names(value["targets"]))


def _parse_bitsandbytes(value: Mapping[str, Any]) -> QuantizationConfig:
    ignore = _names(value.get("llm_int8_skip_modules") or ["lm_head"])
    if value.get("load_in_8bit"):
        return QuantizationConfig(bitsandbytes=BitsAndBytesFormat(kind="int8"), ignore=ignore)
    kind = value.get("bnb_4bit_quant_type", "fp4")
    if not value.get("load_in_4bit") or kind not in ("nf4", "fp4"):
        raise ConfigError(
            "quantization_config: bitsandbytes needs load_in_8bit, or load_in_4bit with "
            f"bnb_4bit_quant_type nf4 or fp4 (here {kind!r})"
        )
    if value.get("bnb_4bit_quant_storage", "uint8") != "uint8":
        raise ConfigError("quantization_config: bnb_4bit_quant_storage must be 'uint8'")
    form = BitsAndBytesFormat(
        kind=kind,
        double_quant=bool(value.get("bnb_4bit_use_double_quant")),
        compute_dtype=str(value.get("bnb_4bit_compute_dtype", "float32")),
    )
    return QuantizationConfig(bitsandbytes=form, ignore=ignore)
