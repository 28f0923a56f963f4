"""JSON of a model folder, read strictly: what other readers would disagree about is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from .errors import CheckpointError

__all__ = ["MAX_JSON_BYTES", "parse_json", "read_json"]

MAX_JSON_BYTES = 16 << 20
"""Largest JSON file (and safetensors header) of a model folder that is read."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file at `path`.

    Raises:
        CheckpointError: no readable file, more than `MAX_JSON_BYTES`, or `parse_json` refuses it.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
    return parse_json(data, path)


def parse_json(data: bytes, source: Path) -> dict[str, Any]:
    """The object that `data` holds: UTF-8, no duplicate keys, no NaN or infinity.

    Raises:
        CheckpointError: anything else; the message names `source`.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: holds no JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name in counts if counts[name] > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return result


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")
