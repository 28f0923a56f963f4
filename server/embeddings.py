"""Vectors of texts, and how alike two are."""

from __future__ import annotations

import base64
import math
import sys
from array import array
from collections.abc import Sequence

__all__ = ["as_base64", "cosine", "normalized"]

Vector = Sequence[float]


def normalized(vector: Vector) -> list[float]:
    """`vector` scaled to length 1; one of zeros stays as it is."""
    length = math.sqrt(math.fsum(value * value for value in vector))
    return [value / length for value in vector] if length else list(vector)


def cosine(first: Vector, second: Vector) -> float:
    """Of the angle between two vectors, -1..1; 0 where one has no direction."""
    pairs = zip(normalized(first), normalized(second), strict=True)
    return min(1.0, max(-1.0, math.fsum(left * right for left, right in pairs)))


def as_base64(vector: Vector) -> str:
    """Its float32 values, little-endian, as OpenAI's clients ask for them by default."""
    values = array("f", vector)
    if sys.byteorder == "big":
        values.byteswap()
    return base64.b64encode(values.tobytes()).decode()
