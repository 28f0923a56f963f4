"""The statistics of several engines as those of one, and what passes between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import zip_longest
from typing import Any

from llmserve.engine.engine import EngineStats

__all__ = ["HandoverTotals", "total_stats"]


@dataclass(slots=True)
class HandoverTotals:
    """What was handed over so far."""

    num_requests: int = 0
    """Requests whose prompts were computed by an engine that only reads."""
    num_blocks: int = 0
    """Blocks that the writing engines took in."""
    seconds: float = 0.0
    """Time that engines spent on copying."""
    num_restarts: int = 0
    """Engines that only read and were replaced."""

    def add(self, other: HandoverTotals) -> None:
        """Count what another one counted too."""
        self.num_requests += other.num_requests
        self.num_blocks += other.num_blocks
        self.seconds += other.seconds
        self.num_restarts += other.num_restarts


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
