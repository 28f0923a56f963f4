from __future__ import annotations

import asyncio

import pytest

from llmserve.benchmarks.capacity import CapacityOptions, find_knee, judge
from llmserve.errors import ConfigError
from support.records import make_failure, make_record


def search(capacity: float, *, start_rate: float, tolerance: float = 0.05) -> list[float]:
    """Rates tried on a server that carries `capacity`."""
    tried: list[float] = []

    async def probe(rate: float) -> bool:
        tried.append(rate)
        return rate <= capacity

    asyncio.run(find_knee(probe, start_rate=start_rate, tolerance=tolerance))
    return tried


@pytest.mark.parametrize("capacity", [0.11, 0.9, 1.0, 7.3, 850.0])
@pytest.mark.parametrize("start_rate", [1.0, 3.7])
def test_knee_is_bracketed_from_above_and_below(capacity: float, start_rate: float) -> None:
    tried = search(capacity, start_rate=start_rate)
    met = max(rate for rate in tried if rate <= capacity)
    missed = min(rate for rate in tried if rate > capacity)
    assert missed / met <= 1.05
    assert len(tried) <= 20
    assert len(set(tried)) == len(tried)


def test_knee_near_a_good_guess_takes_few_probes() -> None:
    tried: list[float] = []

    async def probe(rate: float) -> bool:
        tried.append(rate)
        return rate <= 100.0

    asyncio.run(find_knee(probe, start_rate=95.0, tolerance=0.1, factor=1.1))
    assert tried == pytest.approx([95.0, 104.5])


@pytest.mark.parametrize("capacity", [0.0, float("inf")])
def test_search_without_a_knee_ends(capacity: float) -> None:
    assert len(search(capacity, start_rate=1.0)) == 13


def test_share_counts_failures_as_missed() -> None:
    """TTFT 100, 300 and none; TPOT 50 and 10."""
    records = [
        make_record([0.1, 0.15], tokens=2),
        make_record([0.3, 0.31], index=1, tokens=2),
        make_failure("timeout", index=2),
    ]

    def attained(**slos_ms: float) -> float:
        wanted = CapacityOptions(slos_ms=slos_ms, attainment=0.5)
        return judge(records, wanted, rate=2.0, duration_s=4.0).attained

    assert attained(ttft=300) == pytest.approx(2 / 3)
    assert attained(ttft=300, tpot=20) == pytest.approx(1 / 3)
    wanted = CapacityOptions(slos_ms={"ttft": 300}, attainment=2 / 3)
    probe = judge(records, wanted, rate=2.0, duration_s=4.0)
    assert (probe.is_met, probe.goodput, probe.num_requests) == (True, 0.5, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slos_ms": {}}, "must name an objective"),
        ({"attainment": 0.0}, "--attainment must be"),
        ({"attainment": 1.1}, "--attainment must be"),
        ({"start_rate": 0.0}, "--start-rate must be above 0"),
        ({"probe_s": float("inf")}, "--probe-seconds must be above 0"),
        ({"tolerance": float("nan")}, "--tolerance must be above 0"),
    ],
)
def test_searches_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CapacityOptions(**({"slos_ms": {"ttft": 1.0}} | changes))  # type: ignore[arg-type]
