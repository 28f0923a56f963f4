"""`quantization_config` of folders that GPTQ and AWQ programs publish. They are read, not written.

Sources: `GPTQConfig` and `AwqConfig` of transformers 5, which AutoGPTQ, GPTQModel and AutoAWQ
write; GPTQ arXiv 2210.17323, AWQ arXiv 2306.00978.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from ..errors import ConfigError
from .layer_groups import LayerGroup, layer_names

__all__ = ["parse_awq", "parse_gptq"]

_HEAD = "lm_head"


def parse_gptq(value: Mapping[str, Any]) -> tuple[tuple[LayerGroup, ...], tuple[str, ...]]:
    """Groups and ignored names. Raises `ConfigError` for what is not supported."""
    form = value.get("checkpoint_format") or value.get("format") or "gptq"
    if form not in ("gptq", "gptq_v2"):
        raise ConfigError(f"quantization_config: GPTQ format {form!r}; gptq and gptq_v2 are read")
    if value.get("dynamic"):
        raise ConfigError("quantization_config: GPTQ's `dynamic` (bits by layer) is not supported")
    packing: Literal["gptq", "gptq_v2"] = "gptq" if form == "gptq" else "gptq_v2"
    group = LayerGroup(
        bits=_bits(value, (4, 8)),
        group_size=_size(value),
        targets=_inside_blocks(value.get("modules_in_block_to_quantize")),
        packing=packing,
        is_symmetric=False,  # zero points are stored even where they are all in the middle
        has_order=True,
    )
    return (group,), () if value.get("lm_head") else (_HEAD,)


def parse_awq(value: Mapping[str, Any]) -> tuple[tuple[LayerGroup, ...], tuple[str, ...]]:
    """Groups and ignored names. Raises `ConfigError` for what is not supported."""
    form = str(value.get("version") or value.get("format") or "gemm").lower()
    if form != "gemm":
        raise ConfigError(f"quantization_config: AWQ version {form!r}; 'gemm' is read")
    if not value.get("zero_point", True):
        raise ConfigError("quantization_config: AWQ without zero points is not supported")
    group = LayerGroup(
        bits=_bits(value, (4,)),
        group_size=_size(value),
        targets=("Linear",),
        packing="awq",
        is_symmetric=False,
    )
    kept = layer_names(value.get("modules_to_not_convert") or [])
    # A whole name, its beginning or its end, as transformers reads the list.
    patterns = (f"re:(?:.*\\.)?{re.escape(name)}(?:\\..*)?$" for name in kept)
    return (group,), (_HEAD, *patterns)


def _inside_blocks(value: object) -> tuple[str, ...]:
    """Targets for `modules_in_block_to_quantize`: lists of names inside a block; None: all."""
    if value is None:
        return ("Linear",)
    if not isinstance(value, list):
        raise ConfigError(f"quantization_config: modules_in_block_to_quantize is {value!r}")
    flat = [name for part in value for name in (part if isinstance(part, list) else [part])]
    return tuple(f"re:.*\\.{re.escape(name)}$" for name in layer_names(flat))


def _bits(value: Mapping[str, Any], allowed: tuple[int, ...]) -> Literal[4, 8]:
    bits = value.get("bits", value.get("w_bit"))
    if bits not in allowed:
        raise ConfigError(f"quantization_config: {bits!r} bits; {' or '.join(map(str, allowed))}")
    return 8 if bits == 8 else 4


def _size(value: Mapping[str, Any]) -> int | None:
    size = value.get("group_size", value.get("q_group_size", 128))
    if type(size) is not int or size < -1 or size == 0:
        raise ConfigError(f"quantization_config: group_size {size!r}; a positive one or -1 is read")
    return None if size == -1 else size
