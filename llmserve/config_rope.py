"""Rotary positions in a `config.json` ⇄ the fields of `ModelConfig`, in both spellings.

Version 4 of transformers has `rope_theta`, `rope_scaling` and `partial_rotary_factor` side by side,
version 5 all of them in `rope_parameters`; for models with two bases, one such object for each
kind of layer. Both are written: each version reads its own and ignores the other.
"""

from __future__ import annotations

import math
from typing import Any

from .config import ModelConfig, RopeScaling
from .config_values import Values, first
from .errors import ConfigError

__all__ = [
    "parse_local_rope",
    "parse_partial_rope",
    "parse_rope",
    "render_local_rope",
    "render_partial_rope",
    "render_rope",
]

_KEYS = {
    "factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings",
    "partial_rotary_factor", "rope_theta", "rope_type", "type",
}  # fmt: skip
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"


def parse_rope(values: Values, *, theta: float = 10_000.0) -> dict[str, Any]:
    """Base and scaling, from either spelling; two that disagree are refused.

    `theta` is the base where none is given.
    """
    fields = _parse(values, theta)
    for rope in (values, _mapping(values, "rope_parameters"), _mapping(values, "rope_scaling")):
        if first(rope.get("partial_rotary_factor"), 1.0) != 1.0:
            raise ConfigError("partial_rotary_factor is not supported here")
    return fields


def parse_partial_rope(values: Values, head_dim: int) -> dict[str, Any]:
    """The same where a part of each head may be turned (Phi-3); nothing is stretched then."""
    fields = _parse(values, 10_000.0)
    if fields["rope_scaling"] is not None:
        raise ConfigError("rope_scaling is not supported here")
    inside = _mapping(values, "rope_parameters").get("partial_rotary_factor")
    factor = first(inside, values.get("partial_rotary_factor"), 1.0)
    if first(values.get("partial_rotary_factor"), factor) != factor:
        raise ConfigError("partial_rotary_factor differs from that in rope_parameters")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 1:
        raise ConfigError(f"partial_rotary_factor must be above 0, at most 1, got {factor!r}")
    size = int(head_dim * factor)
    return {**fields, "rotary_dim": None if size == head_dim else size}


def parse_local_rope(values: Values) -> dict[str, Any]:
    """The same where layers with a window have a base of their own (Gemma 3)."""
    new = _mapping(values, "rope_parameters")
    unknown = sorted(new.keys() - {_GLOBAL, _LOCAL})
    if unknown:
        raise ConfigError(f"rope_parameters: {unknown} instead of one object for each layer type")
    wide, local = _mapping(new, _GLOBAL), _mapping(new, _LOCAL)
    fields = parse_rope({**values, "rope_parameters": wide}, theta=1_000_000.0)
    old_theta = values.get("rope_local_base_freq")
    local_values = {"rope_theta": old_theta, "rope_parameters": local}
    narrow = parse_rope(local_values, theta=10_000.0)
    if narrow["rope_scaling"] is not None:
        raise ConfigError(f"rope_parameters: scaling of {_LOCAL} is not supported")
    return {**fields, "local_rope_theta": narrow["rope_theta"]}


def render_rope(config: ModelConfig) -> dict[str, Any]:
    """What `parse_rope` reads."""
    scaling = _render_scaling(config.rope_scaling)
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {
            "rope_theta": config.rope_theta,
            **(scaling or {"rope_type": "default"}),
        },
    }


def render_partial_rope(config: ModelConfig) -> dict[str, Any]:
    """What `parse_partial_rope` reads."""
    factor = config.rotary_size / config.head_dim
    if int(config.head_dim * factor) < config.rotary_size:  # rounded down
        factor = math.nextafter(factor, 2.0)
    values = render_rope(config)
    values["rope_parameters"]["partial_rotary_factor"] = factor
    return {**values, "partial_rotary_factor": factor}


def render_local_rope(config: ModelConfig) -> dict[str, Any]:
    """What `parse_local_rope` reads."""
    values = render_rope(config)
    theta = first(config.local_rope_theta, 10_000.0)
    values["rope_parameters"] = {
        _GLOBAL: values["rope_parameters"],
        _LOCAL: {"rope_theta": theta, "rope_type": "default"},
    }
    return {**values, "rope_local_base_freq": theta}


def _parse(values: Values, default: float) -> dict[str, Any]:
    new = _mapping(values, "rope_parameters")
    old = _mapping(values, "rope_scaling")
    theta = first(new.get("rope_theta"), values.get("rope_theta"), old.get("rope_theta"), default)
    if values.get("rope_theta") not in (None, theta):
        raise ConfigError(
            f"rope_theta is {values['rope_theta']!r} and {theta!r} in rope_parameters"
        )
    scaling, old_scaling = _parse_scaling(new, values), _parse_scaling(old, values)
    if new and old and scaling != old_scaling:
        raise ConfigError("rope_parameters and rope_scaling disagree")
    return {"rope_theta": theta, "rope_scaling": scaling if new else old_scaling}


def _parse_scaling(rope: Values, values: Values) -> RopeScaling | None:
    kind = first(rope.get("rope_type"), rope.get("type"), "default")
    if kind not in ("default", "linear", "llama3"):
        raise ConfigError(f"rope type {kind!r} is not supported; default, linear and llama3 are")
    unknown = sorted(rope.keys() - _KEYS)
    if unknown:
        raise ConfigError(f"rope settings {unknown} are not supported")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=_take(rope, "factor"))
    return RopeScaling(
        kind="llama3",
        factor=_take(rope, "factor"),
        low_freq_factor=_take(rope, "low_freq_factor"),
        high_freq_factor=_take(rope, "high_freq_factor"),
        original_max_seq_len=first(
            rope.get("original_max_position_embeddings"),
            values.get("max_position_embeddings"),
        ),
    )


def _render_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The scaling in the spelling that `rope_scaling` and `rope_parameters` share."""
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_seq_len,
    }


def _take(values: Values, name: str) -> Any:
    if values.get(name) is None:
        raise ConfigError(f"{name} is missing from the rope settings")
    return values[name]


def _mapping(values: Values, name: str) -> Values:
    value = first(values.get(name), {})
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be an object, got {value!r}")
    return value
