"""Sliding windows in a `config.json` ⇄ the fields of `ModelConfig`.

Transformers' `layer_types` says of each layer whether its queries see the window or everything;
files of before had rules of their families instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .config import ModelConfig
from .config_values import Values, first
from .errors import ConfigError

__all__ = ["parse_window", "parse_windows", "render_windows"]

_KINDS = {"full_attention": False, "sliding_attention": True}


def parse_window(values: Values) -> dict[str, Any]:
    """`sliding_window`, where every layer has it; null: none has (Mistral)."""
    window = values.get("sliding_window")
    kind = "full_attention" if window is None else "sliding_attention"
    layer_types = first(values.get("layer_types"), [kind])
    if not isinstance(layer_types, list) or any(other != kind for other in layer_types):
        raise ConfigError(f"layer_types other than {kind!r} are not supported here")
    return {"sliding_window": window}


def parse_windows(values: Values, is_windowed: Sequence[bool]) -> dict[str, Any]:
    """`sliding_window` of the layers that `layer_types` names; by default those of `is_windowed`.

    A window that no layer has is left out.
    """
    kinds = first(values.get("layer_types"), None)
    if kinds is not None:
        if not isinstance(kinds, list) or any(
            not isinstance(kind, str) or kind not in _KINDS for kind in kinds
        ):
            raise ConfigError(f"layer_types must list {' and '.join(_KINDS)}, got {kinds!r}")
        if len(kinds) != len(is_windowed):
            raise ConfigError(f"layer_types has {len(kinds)} entries for {len(is_windowed)} layers")
        is_windowed = [_KINDS[kind] for kind in kinds]
    if not any(is_windowed):
        return {}
    if values.get("sliding_window") is None:
        raise ConfigError("layer_types names sliding_attention, but there is no sliding_window")
    full = tuple(index for index, has_window in enumerate(is_windowed) if not has_window)
    return {"sliding_window": values["sliding_window"], "full_attention_layers": full}


def render_windows(config: ModelConfig) -> dict[str, Any]:
    """What `parse_windows` reads."""
    kinds = {has_window: kind for kind, has_window in _KINDS.items()}
    return {
        "sliding_window": config.sliding_window,
        "layer_types": [
            kinds[config.window_of(index) is not None] for index in range(config.num_layers)
        ],
    }
