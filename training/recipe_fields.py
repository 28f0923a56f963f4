"""What every class of recipes does with its fields: check them, read, describe and digest them."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from llmserve.errors import ConfigError

__all__ = [
    "DeviceName",
    "check_fields",
    "check_known",
    "check_type",
    "field_docs",
    "fields_sha256",
    "read_toml",
]


DeviceName = Literal["cpu", "cuda"]
"""Where a run computes."""


def check_fields(recipe: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Refuse a field of another type than declared, or outside its range; then a batch whose parts
    are not equal.

    Raises:
        ConfigError: with what is allowed.
    """
    hints = get_type_hints(type(recipe))
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        check_type(field.name, value, hints[field.name])
        _check_range(field.name, value, ranges.get(field.name))
    if recipe.batch_size % recipe.accumulation:
        raise ConfigError(
            f"accumulation ({recipe.accumulation}) must divide batch_size ({recipe.batch_size})"
        )


def check_known(recipe: type, source: object, values: Mapping[str, Any]) -> None:
    """Refuse settings in `source` that are no fields of the class. Raises `ConfigError`."""
    known = {field.name for field in fields(recipe)}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise ConfigError(f"{source}: unknown settings {unknown}; known: {sorted(known)}")


def fields_sha256(recipe: Any) -> str:
    """Digest of all fields."""
    text = json.dumps(asdict(recipe), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


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


def _check_range(name: str, value: Any, bounds: tuple[float, float] | None) -> None:
    """Refuse a number outside `bounds`, NaN too. Raises `ConfigError`."""
    if bounds is None or value is None:
        return
    low, high = bounds
    if not low <= value <= high:
        raise ConfigError(f"{name} must be from {low} to {high}, got {value!r}")


@cache
def field_docs(recipe: type) -> dict[str, str]:
    """What stands beneath each field of a class of recipes: the help of its option."""
    body = ast.parse(inspect.getsource(recipe)).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(statement.target, ast.Name)
            docs[statement.target.id] = ast.literal_eval(following.value)
    return docs


def read_toml(path: Path) -> dict[str, Any]:
    """What the TOML file at `path` says. Raises `ConfigError` if it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: no TOML file that can be read: {error}") from error
