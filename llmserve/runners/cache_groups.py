"""Which layers share a cache group: those whose queries see equally far back.

What a sliding window no longer shows can be given back, what a layer without one keeps cannot. So
every runner keeps one pool of blocks for each window that occurs, in the order made here.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import ModelConfig

__all__ = ["LayerGroup", "group_layers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Layers with the same window."""

    window: int | None
    """Tokens that a query sees, its own included; None: all before it."""
    layers: tuple[int, ...]
    """Indices of the layers, ascending."""


def group_layers(config: ModelConfig) -> tuple[LayerGroup, ...]:
    """The groups of a model: the one without a window first, then from the narrowest up."""
    layers: dict[int | None, list[int]] = {}
    for index in range(config.num_layers):
        layers.setdefault(config.window_of(index), []).append(index)
    return tuple(
        LayerGroup(window=window, layers=tuple(layers[window]))
        for window in sorted(layers, key=lambda window: -1 if window is None else window)
    )
