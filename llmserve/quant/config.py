"""How a model folder says that its weights are quantized: `quantization_config` of config.json.

Two methods are read and written: compressed-tensors (int4 and int8 weights) and bitsandbytes (NF4,
FP4, LLM.int8). Two more are read: GPTQ and AWQ. Everything else is refused by name, as is every
setting of these that the decoders here would not honour.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ConfigError
from .bnb import BitsAndBytesFormat
from .config_compressed import has_int8_cache, parse_compressed, render_compressed
from .config_published import parse_awq, parse_gptq
from .layer_groups import LayerGroup, is_part_of, layer_names, most_specific

__all__ = ["LayerGroup", "QuantizationConfig"]

Method = Literal["compressed-tensors", "bitsandbytes", "gptq", "awq"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationConfig:
    """Which layers are quantized and how. There are groups, or there is bitsandbytes' format."""

    groups: tuple[LayerGroup, ...] = ()
    """The groups. A layer's name goes before a pattern, that before Linear."""
    bitsandbytes: BitsAndBytesFormat | None = None
    """bitsandbytes: its format; every linear layer that is not ignored has it."""
    ignore: tuple[str, ...] = ("lm_head",)
    """Layers that stay as they are: names, `re:` patterns, or (bitsandbytes) parts of names."""
    has_int8_cache: bool = False
    """Whether keys and values are to be kept as int8 (compressed-tensors only)."""

    def __post_init__(self) -> None:
        if bool(self.groups) == (self.bitsandbytes is not None):
            raise ConfigError("quantization_config: either groups of layers or bitsandbytes")

    @property
    def method(self) -> Method:
        """Name of the method in config.json."""
        if self.bitsandbytes is not None:
            return "bitsandbytes"
        packing = self.groups[0].packing
        if packing == "awq":
            return "awq"
        return "gptq" if packing in ("gptq", "gptq_v2") else "compressed-tensors"

    @property
    def scheme(self) -> str:
        """Short name of the form on disk: int8, int4, w8a8, int4+int8, gptq-int4, nf4 ..."""
        if self.bitsandbytes is not None:
            return self.bitsandbytes.kind if self.bitsandbytes.kind != "int8" else "bnb-int8"
        has_activations = any(group.has_int8_activations for group in self.groups)
        names = {f"int{group.bits}" for group in self.groups}
        scheme = "w8a8" if has_activations and names == {"int8"} else "+".join(sorted(names))
        return scheme if self.method == "compressed-tensors" else f"{self.method}-{scheme}"

    def is_quantized(self, layer: str) -> bool:
        """Whether the linear layer of that name (no `.weight` at its end) is quantized."""
        if self.bitsandbytes is not None:
            return not any(_is_skipped(part, layer) for part in self.ignore)
        return self.group_of(layer) is not None

    def group_of(self, layer: str) -> LayerGroup | None:
        """The group of a layer; None for a layer that is not quantized."""
        return None if is_part_of(self.ignore, layer) else most_specific(self.groups, layer)

    def render(self) -> dict[str, Any]:
        """The value of `quantization_config` in config.json."""
        if self.bitsandbytes is not None:
            return _render_bitsandbytes(self.bitsandbytes, self.ignore)
        return render_compressed(self.groups, self.ignore, has_int8_cache=self.has_int8_cache)

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> QuantizationConfig:
        """Read `quantization_config` of a config.json. Raises `ConfigError` for what is unknown."""
        method = value.get("quant_method")
        if method not in (*_PARSERS, "bitsandbytes"):
            raise ConfigError(
                f"quantization_config: method {method!r} is not supported; "
                f"{', '.join(_PARSERS)} and bitsandbytes are"
            )
        try:
            if method == "bitsandbytes":
                return _parse_bitsandbytes(value)
            groups, ignore = _PARSERS[str(method)](value)
            return cls(groups=groups, ignore=ignore, has_int8_cache=has_int8_cache(value))
        except (KeyError, TypeError, AttributeError, re.error) as error:
            raise ConfigError(f"quantization_config is malformed: {error}") from error


_PARSERS = {"compressed-tensors": parse_compressed, "gptq": parse_gptq, "awq": parse_awq}


def _is_skipped(part: str, layer: str) -> bool:
    """transformers' rule for `llm_int8_skip_modules`: a whole name, its beginning or its end."""
    return layer == part or layer.startswith(f"{part}.") or layer.endswith(f".{part}")


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


def _parse_bitsandbytes(value: Mapping[str, Any]) -> QuantizationConfig:
    ignore = layer_names(value.get("llm_int8_skip_modules") or ["lm_head"])
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
