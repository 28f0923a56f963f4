"""The front against every combination there is."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from llmserve.export.search_front import Option, pareto_front


def options(rng: np.random.Generator, count: int) -> list[Option]:
    sizes = rng.integers(10, 100, count)
    return [Option(num_bytes=int(size), cost=float(rng.uniform(0, 1))) for size in sizes]


@pytest.mark.parametrize("seed", range(20))
def test_no_combination_is_better_than_a_point_of_the_front(seed: int) -> None:
    rng = np.random.default_rng(seed)
    units = [options(rng, count) for count in (4, 3, 5)]
    front = pareto_front(units)
    everything = [
        (sum(one.num_bytes for one in chosen), sum(one.cost for one in chosen))
        for chosen in product(*units)
    ]
    for point in front:
        assert not any(
            size <= point.num_bytes and cost < point.cost - 1e-12 for size, cost in everything
        )
    assert front[0].num_bytes == min(size for size, _ in everything)
    assert front[-1].cost == pytest.approx(min(cost for _, cost in everything))


def test_sizes_rise_and_costs_fall_along_the_front() -> None:
    units = [options(np.random.default_rng(seed), 5) for seed in range(9)]
    front = pareto_front(units)
    assert [one.num_bytes for one in front] == sorted(one.num_bytes for one in front)
    assert [one.cost for one in front] == sorted((one.cost for one in front), reverse=True)
    for point in front:
        chosen = [unit[choice] for unit, choice in zip(units, point.choices, strict=True)]
        assert point.num_bytes == sum(one.num_bytes for one in chosen)


def test_option_that_costs_more_and_is_larger_is_never_taken() -> None:
    bad = Option(num_bytes=90, cost=0.5)
    units = [[Option(num_bytes=10, cost=0.4), bad, Option(num_bytes=50, cost=0.1)]]
    assert [point.choices for point in pareto_front(units)] == [(0,), (2,)]
