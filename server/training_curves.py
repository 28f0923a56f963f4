"""The curves of the training that made a model, read from the log in its folder.

A folder made by `llmserve train` or `llmserve finetune`, or from such a one, holds
`training_log.jsonl`, one JSON object a line: means over some steps with `loss`, and evaluations
with `held_out_loss`, both with `step`.
Here its losses become as many points as a chart can show.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from llmserve.errors import CheckpointError
from llmserve.lineage import TRAINING_LOG
from llmserve.strict_json import MAX_JSON_BYTES, parse_json

__all__ = ["MAX_POINTS", "read_curves"]

CURVES = ("loss", "held_out_loss")
"""Keys of the lines that a curve of the same name is made of."""

MAX_POINTS = 300
"""Points of a curve; of more, means of neighbours are told."""

Point = tuple[float, float]

_log = logging.getLogger("llmserve.server")


def read_curves(folder: Path) -> dict[str, list[Point]] | None:
    """Curves of (step, nats a token) by name; None: the folder tells of no training.

    A log that cannot be read is no reason not to serve the model: it is said in the log.
    """
    path = folder / TRAINING_LOG
    if not path.is_file():
        return None
    try:
        lines = _read_lines(path)
        curves = {name: _thinned(_points(lines, name, path)) for name in CURVES}
    except CheckpointError as error:
        _log.warning("no training curves: %s", error)
        return None
    return {name: points for name, points in curves.items() if points} or None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
    return [parse_json(line, path) for line in data.split(b"\n") if line]


def _points(lines: list[dict[str, Any]], key: str, path: Path) -> list[Point]:
    points: list[tuple[Any, Any]] = [(line.get("step"), line[key]) for line in lines if key in line]
    if not all(_is_number(step) and _is_number(value) for step, value in points):
        raise CheckpointError(f"{path}: step and {key} must be finite numbers")
    return points


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _thinned(points: list[Point]) -> list[Point]:
    """The same curve in at most `MAX_POINTS` points; the last one stays as it is."""
    if len(points) <= MAX_POINTS:
        return points
    size = -(-(len(points) - 1) // (MAX_POINTS - 1))
    groups = [points[start : start + size] for start in range(0, len(points) - 1, size)]
    groups[-1] = [point for point in groups[-1] if point is not points[-1]]
    means = [
        (sum(step for step, _ in group) / len(group), sum(value for _, value in group) / len(group))
        for group in groups
    ]
    return [*means, points[-1]]
