"""Reading the values of a `config.json` that somebody else wrote: each checked, none trusted."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from .config import RopeScaling
from .errors import ConfigError

__all__ = [
    "Values",
    "first",
    "parse_rope",
    "parse_special_ids",
    "render_scaling",
    "render_special_ids",
    "take_bool",
    "take_choice",
    "take_count",
]

Values = Mapping[str, Any]
"""The object that a JSON file holds."""

_ROPE_KEYS = {
    "factor",
    "high_freq_factor",
    "low_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_theta",
    "rope_type",
    "type",
}

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


def parse_special_ids(values: Values, vocab_size: int) -> dict[str, Any]:
    """The `ModelConfig` fields of the special ids, as far as they are given."""
    return {
        "bos_token_id": first(*_ids(values, "bos_token_id", vocab_size)),
        "eos_token_ids": _ids(values, "eos_token_id", vocab_size),
        "pad_token_id": first(*_ids(values, "pad_token_id", vocab_size)),
    }


def render_special_ids(
    bos_token_id: int | None, eos_token_ids: tuple[int, ...], pad_token_id: int | None
) -> dict[str, Any]:
    """The special ids as other programs write them: one end id as a number, several as a list."""
    ends = eos_token_ids
    return {
        "bos_token_id": bos_token_id,
        "eos_token_id": None if not ends else ends[0] if len(ends) == 1 else list(ends),
        "pad_token_id": pad_token_id,
    }


def parse_rope(values: Values) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from either spelling; two that disagree are refused."""
    new = _mapping(values, "rope_parameters")
    old = _mapping(values, "rope_scaling")
    theta = first(new.get("rope_theta"), values.get("rope_theta"), old.get("rope_theta"), 10_000.0)
    if values.get("rope_theta") not in (None, theta):
        raise ConfigError(
            f"rope_theta is {values['rope_theta']!r} and {theta!r} in rope_parameters"
        )
    scaling, old_scaling = _parse_scaling(new, values), _parse_scaling(old, values)
    if new and old and scaling != old_scaling:
        raise ConfigError("rope_parameters and rope_scaling disagree")
    return theta, scaling if new else old_scaling


def _parse_scaling(rope: Values, values: Values) -> RopeScaling | None:
    unknown = sorted(rope.keys() - _ROPE_KEYS)
    if unknown or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"rope settings {unknown or 'partial_rotary_factor'} are not supported")
    kind = first(rope.get("rope_type"), rope.get("type"), "default")
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise ConfigError(f"rope type {kind!r} is not supported; default, linear and llama3 are")
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


def render_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
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


def _take(values: Values, name: str) -> Any:
    if values.get(name) is None:
        raise ConfigError(f"{name} is missing from the rope settings")
    return values[name]


def _mapping(values: Values, name: str) -> Values:
    value = first(values.get(name), {})
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be an object, got {value!r}")
    return value
