"""The option `--speculative-config`: vLLM's JSON, read into our settings.

{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 4}
{"method": "draft", "model": "run/small", "num_speculative_tokens": 3}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .engine.config import SpeculationConfig
from .errors import CheckpointError, ConfigError
from .strict_json import parse_json

__all__ = ["Speculation", "parse_speculation"]

OPTION = "--speculative-config"
KEYS: Mapping[str, type] = {
    "method": str,
    "num_speculative_tokens": int,
    "prompt_lookup_min": int,
    "prompt_lookup_max": int,
    "model": str,
    "always": bool,
}
METHODS: Mapping[str, frozenset[str]] = {
    "ngram": frozenset({"prompt_lookup_min", "prompt_lookup_max"}),
    "draft": frozenset({"model"}),
}
"""Keys that belong to one method alone."""
KINDS = {str: "a string", int: "a whole number", bool: "true or false"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """What the option asks for."""

    config: SpeculationConfig
    """How tokens are guessed ahead."""
    draft_model: str | None
    """Folder of the model that guesses, for the method `draft`."""


def parse_speculation(text: str) -> Speculation:
    """The settings in a JSON object.

    Raises:
        ConfigError: no JSON object, an unknown key, a value of another type or out of range, or
            keys that do not go together.
    """
    try:
        values = parse_json(text.encode(), Path(OPTION))
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    _check_types(values)
    method = values.get("method", "")
    if method not in METHODS:
        raise ConfigError(f"{OPTION} needs the method {' or '.join(METHODS)}, got {method!r}")
    _check_keys(values, method)
    defaults = SpeculationConfig(method=method)
    longest = values.get("prompt_lookup_max", defaults.max_ngram)
    config = SpeculationConfig(
        method=method,
        num_draft_tokens=values.get("num_speculative_tokens", defaults.num_draft_tokens),
        min_ngram=values.get("prompt_lookup_min", min(defaults.min_ngram, longest)),
        max_ngram=longest,
        is_always_on=values.get("always", defaults.is_always_on),
    )
    return Speculation(config=config, draft_model=values.get("model"))


def _check_types(values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if key not in KEYS:
            raise ConfigError(f"{OPTION} has no key {key!r}; known: {', '.join(KEYS)}")
        if type(value) is not KEYS[key]:
            raise ConfigError(f"{OPTION}: {key} must be {KINDS[KEYS[key]]}, got {value!r}")


def _check_keys(values: Mapping[str, Any], method: str) -> None:
    for other, keys in METHODS.items():
        wrong = sorted(keys & values.keys()) if other != method else []
        if wrong:
            raise ConfigError(f"{OPTION}: {wrong[0]} is for the method {other}, not {method}")
    if method == "draft" and not values.get("model"):
        raise ConfigError(f"{OPTION}: the method draft needs model, the draft model's folder")
