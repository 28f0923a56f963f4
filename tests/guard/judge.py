"""What a comparison of two trees shows: lost, gained, or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmserve.benchmarks.statistics import Interval, mean_of_runs

__all__ = ["LIMIT", "Verdict", "judge", "table"]

LIMIT = 1.05
"""How much dearer a case may become."""

Costs = Mapping[str, Sequence[float]]
"""Case → its cost in each round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One case in both trees."""

    case: str
    base: float
    """Mean cost."""
    tree: float
    ratio: float
    """`tree` over `base`, each round's taken by itself, their geometric mean."""
    interval: Interval
    """95 % of the ratio."""

    @property
    def is_lost(self) -> bool:
        """Whether it is dearer for sure, and by more than `LIMIT`."""
        return self.interval.low > 1.0 and self.ratio > LIMIT

    @property
    def word(self) -> str:
        """The verdict as the table says it."""
        if self.is_lost:
            return "LOST"
        if self.interval.low <= 1.0 <= self.interval.high:
            return "no difference shown"
        return "dearer, within the limit" if self.ratio > 1.0 else "cheaper"


def judge(base: Costs, tree: Costs) -> list[Verdict]:
    """A verdict for each case that both have. Every case needs two rounds or more, all above 0."""
    return [_verdict(case, base[case], tree[case]) for case in tree if case in base]


def table(verdicts: Sequence[Verdict], unit: str) -> list[str]:
    """Lines for a person."""
    lines = [f"{'case':<12}{'base, ' + unit:>22}{'tree, ' + unit:>22}{'ratio':>8}  95 %"]
    for one in verdicts:
        sure = f"{one.interval.low:.3f}-{one.interval.high:.3f}"
        costs = f"{one.base:>22,.2f}{one.tree:>22,.2f}"
        lines.append(f"{one.case:<12}{costs}{one.ratio:>8.3f}  {sure}  {one.word}")
    return lines


def _verdict(case: str, base: Sequence[float], tree: Sequence[float]) -> Verdict:
    ratio, interval = mean_of_runs([b / a for a, b in zip(base, tree, strict=True)])
    assert interval is not None, "one round says nothing of the noise"
    return Verdict(
        case=case,
        base=sum(base) / len(base),
        tree=sum(tree) / len(tree),
        ratio=ratio,
        interval=interval,
    )
