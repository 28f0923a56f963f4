"""Layers that are quantized alike, and by which names a folder picks them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError
from .grids import Bits

__all__ = ["LayerGroup", "Packing", "is_part_of", "layer_names", "most_specific"]

Packing = Literal["pack-quantized", "int-quantized", "gptq", "gptq_v2", "awq"]
"""How integers lie in a file: two of compressed-tensors, two of GPTQ, AWQ's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Layers of one form (compressed-tensors: one entry of `config_groups`)."""

    bits: Bits
    """Bits per integer."""
    group_size: int | None
    """Inputs that share a scale; None: one scale per output row."""
    targets: tuple[str, ...]
    """Layer names without `.weight`, `re:` patterns, or `Linear` for every linear layer."""
    packing: Packing = "pack-quantized"
    """How the integers are stored."""
    is_symmetric: bool = True
    """Whether there are no zero points."""
    has_order: bool = False
    """Whether the group of each input is stored (GPTQ's activation order)."""
    has_int8_activations: bool = False
    """Whether the folder asks for int8 activations, with one scale for each token (W8A8)."""


def layer_names(value: object) -> tuple[str, ...]:
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


def most_specific(groups: tuple[LayerGroup, ...], layer: str) -> LayerGroup | None:
    """The group that picks `layer`: by its name, else by a pattern, else by its class."""
    for matches in _MATCHERS:
        for group in groups:
            if any(matches(target, layer) for target in group.targets):
                return group
    return None


def is_part_of(targets: tuple[str, ...], layer: str) -> bool:
    """Whether `layer` is picked by one of the targets."""
    return any(matches(target, layer) for matches in _MATCHERS for target in targets)


# Patterns of strangers' files: few wildcards and no repeated groups, so that matching stays quick.
_SAFE_PATTERN = re.compile(r"(?:\.\*|\\d\+|\\\.|[\w.$^|()-])*", re.ASCII)
_MAX_WILDCARDS = 4


def _is_name(target: str, layer: str) -> bool:
    return target == layer


def _is_pattern(target: str, layer: str) -> bool:
    return target.startswith("re:") and re.match(target[3:], layer) is not None


def _is_class(target: str, layer: str) -> bool:
    return target == "Linear"


# In the order that compressed-tensors looks: the most specific first.
_MATCHERS = (_is_name, _is_pattern, _is_class)
