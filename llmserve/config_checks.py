"""Checks of a model's settings, and the bounds of what is believed.

The bounds guard against lying configurations: nothing is allocated before they are checked.
"""

from __future__ import annotations

from collections.abc import Sequence

from .errors import ConfigError

__all__ = [
    "MAX_CONTEXT",
    "MAX_EXPERTS",
    "MAX_LAYERS",
    "MAX_VOCAB_SIZE",
    "MAX_WIDTH",
    "check_choice",
    "check_count",
    "check_flag",
    "check_layers",
    "check_positive",
]

MAX_LAYERS = 512
MAX_WIDTH = 65_536
MAX_VOCAB_SIZE = 1 << 20
MAX_CONTEXT = 1 << 24
MAX_EXPERTS = 1 << 16
"""Experts of all layers together."""


def check_count(name: str, value: object, most: int) -> None:
    """Raise `ConfigError` unless `value` is a whole number from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigError(f"{name} must be a whole number from 1 to {most}, got {value!r}")


def check_positive(name: str, value: object) -> None:
    """Raise `ConfigError` unless `value` is a finite number above 0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < float("inf"):  # type: ignore[operator]
        raise ConfigError(f"{name} must be a positive number, got {value!r}")


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise `ConfigError` unless `value` is one of `allowed`."""
    if isinstance(value, bool) or value not in allowed:
        names = ", ".join(map(str, allowed))
        raise ConfigError(f"{name} must be one of {names}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Raise `ConfigError` unless `value` is true or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {value!r}")


def check_layers(name: str, value: Sequence[object], num_layers: int) -> None:
    """Raise `ConfigError` unless `value` lists layers of a model, each once, ascending."""
    is_listing = all(type(index) is int and 0 <= index < num_layers for index in value)
    if not is_listing or list(value) != sorted(set(value)):  # type: ignore[type-var]
        raise ConfigError(
            f"{name} must be layers from 0 to {num_layers - 1}, ascending, got {list(value)}"
        )
