"""The Pareto front of sizes and costs, when each unit of a model may take one of several forms.

The costs of units are taken to add up. Then the front's corners are found by starting with each
unit's smallest form and taking, again and again, the step that lowers the cost most for its bytes:
the greedy solution of the multiple-choice knapsack, exact at every corner (Sinha and Zoltners,
Operations Research 27, 1979).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Option", "Point", "pareto_front"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One form of a unit."""

    num_bytes: int
    cost: float
    """What it adds to the model's cost; not negative."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One choice for every unit."""

    choices: tuple[int, ...]
    """Index of each unit's option."""
    num_bytes: int
    cost: float


def pareto_front(units: Sequence[Sequence[Option]]) -> list[Point]:
    """Points from the smallest size to the least cost. Every unit needs an option."""
    hulls = [_hull(options) for options in units]
    choices = [hull[0] for hull in hulls]
    steps = sorted(
        (_slope(units[unit][old], units[unit][new]), unit, new)
        for unit, hull in enumerate(hulls)
        for old, new in pairwise(hull)
    )
    points = [_point(units, choices)]
    for _, unit, new in steps:
        choices[unit] = new
        points.append(_point(units, choices))
    return points


def _hull(options: Sequence[Option]) -> list[int]:
    """Options on the lower convex hull, by falling cost and rising size."""
    order = sorted(range(len(options)), key=lambda i: (options[i].num_bytes, options[i].cost))
    hull: list[int] = []
    for index in order:
        if hull and options[index].cost >= options[hull[-1]].cost:
            continue
        while len(hull) > 1 and _slope(options[hull[-2]], options[hull[-1]]) >= _slope(
            options[hull[-1]], options[index]
        ):
            hull.pop()
        hull.append(index)
    return hull


def _slope(old: Option, new: Option) -> float:
    """Change of the cost for each byte more: the lower the better."""
    return (new.cost - old.cost) / max(1, new.num_bytes - old.num_bytes)


def _point(units: Sequence[Sequence[Option]], choices: Sequence[int]) -> Point:
    chosen = [options[choice] for options, choice in zip(units, choices, strict=True)]
    return Point(
        choices=tuple(choices),
        num_bytes=sum(option.num_bytes for option in chosen),
        cost=sum(option.cost for option in chosen),
    )
