from __future__ import annotations

import math

import numpy as np
import pytest

from llmserve.benchmarks.arrivals import Ramp, Steps, arrival_offsets
from llmserve.errors import ConfigError


def gaps(burstiness: float, *, rate: float = 20.0, count: int = 20_000) -> np.ndarray:
    offsets = arrival_offsets(count, request_rate=rate, burstiness=burstiness, seed=3)
    return np.diff(offsets, prepend=0.0)


def test_last_request_is_due_when_the_rate_says() -> None:
    offsets = arrival_offsets(50, request_rate=4.0, burstiness=1.0, seed=0)
    assert offsets[-1] == pytest.approx(50 / 4.0)
    assert np.all(np.diff(offsets) >= 0)
    assert offsets[0] > 0


def test_poisson_gaps_are_exponential() -> None:
    drawn = gaps(1.0)
    assert drawn.mean() == pytest.approx(1 / 20)
    # Kolmogorov-Smirnov distance to 1 - exp(-20 t); 1.63 / sqrt(n) is the 1 % point.
    ordered = np.sort(drawn)
    law = 1 - np.exp(-20 * ordered)
    steps = np.arange(1, len(ordered) + 1) / len(ordered)
    distance = np.abs(steps - law).max()
    assert distance < 1.63 / math.sqrt(len(ordered))


def test_poisson_counts_vary_as_much_as_their_mean() -> None:
    offsets = arrival_offsets(20_000, request_rate=20.0, burstiness=1.0, seed=5)
    counts = np.bincount(offsets.astype(int))[:-1]
    assert counts.mean() == pytest.approx(20, rel=0.02)
    assert counts.var() == pytest.approx(20, rel=0.15)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_burstiness_is_the_inverse_of_the_squared_variation(burstiness: float) -> None:
    drawn = gaps(burstiness)
    variation = drawn.var() / drawn.mean() ** 2
    assert variation == pytest.approx(1 / burstiness, rel=0.1)


def test_seed_decides_the_times() -> None:
    first, again, other = (
        arrival_offsets(10, request_rate=1.0, burstiness=1.0, seed=seed) for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_infinite_rate_puts_all_at_the_start() -> None:
    assert not arrival_offsets(5, request_rate=math.inf, burstiness=1.0, seed=0).any()


@pytest.mark.parametrize(("rate", "burstiness"), [(0, 1), (-1, 1), (math.nan, 1), (1, 0), (1, -1)])
def test_rate_and_burstiness_must_be_above_zero(rate: float, burstiness: float) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        arrival_offsets(5, request_rate=rate, burstiness=burstiness, seed=0)


def test_infinite_burstiness_is_refused() -> None:
    with pytest.raises(ConfigError, match="finite"):
        arrival_offsets(5, request_rate=1.0, burstiness=math.inf, seed=0)


def test_burstiness_too_small_to_draw_from_is_refused() -> None:
    with pytest.raises(ConfigError, match="too close to 0"):
        arrival_offsets(2, request_rate=1.0, burstiness=1e-300, seed=0)


def counts_of(rate: Ramp | Steps, count: int, edges: list[float]) -> np.ndarray:
    offsets = arrival_offsets(count, request_rate=rate, burstiness=1.0, seed=2)
    assert np.all(np.diff(offsets) >= 0)
    return np.histogram(offsets, bins=edges)[0]


def test_steps_hold_as_many_requests_as_their_rates_say() -> None:
    steps = Steps(rates=(100.0, 0.0, 400.0, 0.0), seconds=(10.0, 5.0, 10.0, 3.0))
    assert steps.num_requests == 5000
    counts = counts_of(steps, 5000, [0, 10, 15, 25.001, 28])
    assert counts.sum() == 5000
    assert (counts[1], counts[3]) == (0, 0)
    assert counts[0] == pytest.approx(1000, abs=3 * 1000**0.5)


@pytest.mark.parametrize(("start", "end"), [(100.0, 300.0), (300.0, 100.0), (0.0, 400.0)])
def test_linear_ramp_changes_by_equal_differences(start: float, end: float) -> None:
    """The run lasts count / mean rate; each quarter's share is the mean rate within it."""
    offsets = arrival_offsets(
        4000, request_rate=Ramp(strategy="linear", start=start, end=end), burstiness=1.0, seed=2
    )
    assert offsets[-1] == pytest.approx(20.0)
    counts = np.histogram(offsets, bins=np.linspace(0, 20.0, 5))[0]
    law = 5.0 * (start + (end - start) * np.array([1, 3, 5, 7]) / 8)
    assert counts == pytest.approx(law, abs=3 * law.max() ** 0.5)


def test_exponential_ramp_changes_by_equal_factors() -> None:
    ramp = Ramp(strategy="exponential", start=50.0, end=800.0)
    duration_s = math.log(16) * 6000 / 750
    counts = counts_of(ramp, 6000, [duration_s * part / 4 for part in range(5)])
    assert counts[1:] / counts[:-1] == pytest.approx(2.0, rel=0.15)


def test_ramp_between_equal_rates_is_that_rate() -> None:
    flat = Ramp(strategy="exponential", start=4.0, end=4.0)
    np.testing.assert_allclose(
        arrival_offsets(50, request_rate=flat, burstiness=1.0, seed=0),
        arrival_offsets(50, request_rate=4.0, burstiness=1.0, seed=0),
    )


@pytest.mark.parametrize(
    ("strategy", "start", "end"),
    [
        ("linear", 0.0, 0.0),
        ("linear", -1.0, 2.0),
        ("exponential", 0.0, 2.0),
        ("linear", 1.0, math.inf),
        ("linear", math.nan, 1.0),
    ],
)
def test_ramps_that_cannot_be_are_refused(strategy: str, start: float, end: float) -> None:
    with pytest.raises(ConfigError, match="finite rates"):
        Ramp(strategy=strategy, start=start, end=end)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rates", "seconds"), [((1.0,), (0.0,)), ((-1.0,), (5.0,)), ((0.0,), (5.0,))]
)
def test_steps_that_cannot_be_are_refused(
    rates: tuple[float, ...], seconds: tuple[float, ...]
) -> None:
    with pytest.raises(ConfigError, match="steps"):
        Steps(rates=rates, seconds=seconds)
