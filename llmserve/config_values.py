"""Reading the values of a `config.json` that somebody else wrote: each checked, none trusted."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from .errors import ConfigError

__all__ = [
    "Values",
    "first",
    "parse_special_ids",
    "take_bool",
    "take_choice",
    "take_count",
    "take_layers",
]

Values = Mapping[str, Any]
"""The object that a JSON file holds."""

_log = logging.getLogger("llmserve")


def first(*values: Any) -> Any:
    """The first value that is not None; None if there is none."""
    return next((value for value in values if value is not None), None)


def take_count(values: Values, name: str, default: int | None = None) -> int:
    """A positive whole number; `default` where it is absent or null."""
    value = first(values.get(name), default)
    if value is None:
        raise ConfigError(f"{name} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a positive whole number, got {value!r}")
    return value


def take_bool(values: Values, name: str, default: bool) -> bool:
    """True or false; `default` where it is absent or null."""
    value = first(values.get(name), default)
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {value!r}")
    return value


def take_choice(values: Values, name: str, choices: Mapping[str, str], default: str) -> str:
    """What `choices` makes of the string; `default` is the string where it is absent or null."""
    value = first(values.get(name), default)
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name} {value!r} is not supported; {', '.join(choices)} can be opened")
    return choices[value]


def take_layers(values: Values, name: str, num_layers: int) -> tuple[int, ...]:
    """A list of layers, ascending, each once; none where it is absent or null."""
    value = first(values.get(name), [])
    is_listing = isinstance(value, list) and all(type(index) is int for index in value)
    if not is_listing or any(not 0 <= index < num_layers for index in value):
        raise ConfigError(f"{name} must list layers from 0 to {num_layers - 1}, got {value!r}")
    return tuple(sorted(set(value)))


def parse_special_ids(values: Values, vocab_size: int) -> dict[str, Any]:
    """The `ModelConfig` fields of the special ids, as far as they are given."""
    return {
        "bos_token_id": first(*_ids(values, "bos_token_id", vocab_size)),
        "eos_token_ids": _ids(values, "eos_token_id", vocab_size),
        "pad_token_id": first(*_ids(values, "pad_token_id", vocab_size)),
    }


def _ids(values: Values, name: str, vocab_size: int) -> tuple[int, ...]:
    """Ids given as a number, a list or null; those that no token has are left out, aloud."""
    value = values.get(name)
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(token_id, bool) or not isinstance(token_id, int) for token_id in listed):
        raise ConfigError(f"{name} must be a token id or a list of them, got {value!r}")
    # Programs leave their defaults here, such as GPT-2's 50256, whatever the vocabulary.
    outside = [token_id for token_id in listed if not 0 <= token_id < vocab_size]
    if outside:
        _log.warning("%s: %s outside the vocabulary of %d ignored", name, outside, vocab_size)
    return tuple(dict.fromkeys(token_id for token_id in listed if token_id not in outside))
