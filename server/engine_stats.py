"""The statistics of several engines as those of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from itertools import zip_longest
from typing import Any

from llmserve.engine.engine import EngineStats

__all__ = ["total_stats"]


def total_stats(parts: Sequence[EngineStats]) -> EngineStats:
    """Sums; of `cache_usage` the highest. `parts` has one at least."""
    if len(parts) == 1:
        return parts[0]
    values: dict[str, Any] = {
        field.name: sum(getattr(part, field.name) for part in parts)
        for field in fields(EngineStats)
        if field.name not in ("cache_usage", "accepted_per_position")
    }
    by_position = zip_longest(*(part.accepted_per_position for part in parts), fillvalue=0)
    return EngineStats(
        **values,
        cache_usage=max(part.cache_usage for part in parts),
        accepted_per_position=[sum(counts) for counts in by_position],
    )
