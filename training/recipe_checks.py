"""Checks of a recipe's fields, each by itself."""

from __future__ import annotations

from typing import Any, get_args

from llmserve.errors import ConfigError

__all__ = ["check_range", "check_type"]


def check_type(name: str, value: object, hint: Any) -> None:
    """Refuse a value of another type than the field's; a whole number will do for a float.

    Raises:
        ConfigError: with the types or the words that are allowed.
    """
    options = get_args(hint)
    if any(isinstance(option, str) for option in options):
        if value not in options:
            raise ConfigError(f"{name} must be one of {', '.join(options)}, got {value!r}")
        return
    allowed = options or (hint,)
    if float in allowed:
        allowed = (*allowed, int)
    if isinstance(value, bool) != (bool in allowed) or not isinstance(value, allowed):
        raise ConfigError(f"{name} must be {allowed[0].__name__}, got {value!r}")


def check_range(name: str, value: Any, bounds: tuple[float, float] | None) -> None:
    """Refuse a number outside `bounds`, NaN too. Raises `ConfigError`."""
    if bounds is None or value is None:
        return
    low, high = bounds
    if not low <= value <= high:
        raise ConfigError(f"{name} must be from {low} to {high}, got {value!r}")
