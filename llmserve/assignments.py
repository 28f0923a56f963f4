"""Arguments of the form NAME=VALUE, as several options of the command line take them."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import ConfigError

__all__ = ["parse_assignments"]


def parse_assignments(texts: Sequence[str], option: str) -> dict[str, str]:
    """Values by name; `option` is what messages call the argument.

    Raises:
        ConfigError: a text without a name or a value, or a name that comes twice.
    """
    values: dict[str, str] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not name or not value:
            raise ConfigError(f"{option} takes NAME=VALUE, got {text!r}")
        if name in values:
            raise ConfigError(f"{option} gives {name!r} twice: give it once")
        values[name] = value
    return values
