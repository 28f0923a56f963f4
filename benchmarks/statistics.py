"""How sure a figure is: intervals that cover the truth in about 95 of 100 runs.

Within a run, neighbours in time are alike (they met the same queue, the same batch), so whole
blocks of neighbours are drawn with replacement, and the figure's 2.5 and 97.5 percentiles over the
draws are its interval: the percentile bootstrap (Efron and Tibshirani 1993, chapter 13) with
circular blocks (Politis and Romano 1992) of the cube root of the units' number. A unit is a
request with all its values, or a slice of time.

Between runs there are too few units to draw from: `ratio_of_runs` uses Welch's t interval of the
logarithms instead (Welch 1947).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, variance

import numpy as np
import numpy.typing as npt

__all__ = [
    "Interval",
    "Pool",
    "Ratio",
    "block_counts",
    "mean_of_runs",
    "ratio_of_intervals",
    "ratio_of_runs",
]

CONFIDENCE = 0.95
MIN_UNITS = 10
"""Fewer units say too little of their spread."""
MIN_BEYOND = 5
"""Values that must lie beyond a percentile: the tail of a short run has no interval."""

_TAIL = (1.0 - CONFIDENCE) / 2.0
_CHUNK = 1 << 22  # weights held at a time

Counts = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """Where the truth lies with 95 % confidence."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """One figure over another, with its 95 % interval."""

    value: float
    interval: Interval

    @property
    def is_shown(self) -> bool:
        """Whether the two figures differ for sure: 1 lies outside the interval."""
        return not self.interval.low <= 1.0 <= self.interval.high


class Pool:
    """Values of all units of a run together, and what they might have been in another."""

    def __init__(self, values: Sequence[float], units: Sequence[int]) -> None:
        """`units` says whose each value is: its unit's place in the order of time."""
        order = np.argsort(np.asarray(values), kind="stable")
        self._values: Values = np.asarray(values, dtype=np.float64)[order]
        self._units: Counts = np.asarray(units, dtype=np.int64)[order]

    def mean(self, counts: Counts) -> Interval | None:
        """Interval of the mean. `counts`: what `block_counts` drew; None: too few units."""
        if not self._is_enough():
            return None
        num_units = counts.shape[1]
        sums = np.bincount(self._units, weights=self._values, minlength=num_units)
        sizes = np.bincount(self._units, minlength=num_units)
        return _interval((counts @ sums) / np.maximum(counts @ sizes, 1))

    def percentiles(self, counts: Counts, percents: Sequence[float]) -> list[Interval | None]:
        """Intervals of percentiles, linear between values as in numpy; None: too few values."""
        if not self._is_enough():
            return [None] * len(percents)
        chunks = list(self._percentiles(counts, np.asarray(percents) / 100.0))
        draws = np.concatenate(chunks, axis=1)
        return [
            _interval(row) if self._has_tail(percent) else None
            for percent, row in zip(percents, draws, strict=True)
        ]

    def _is_enough(self) -> bool:
        return len(np.unique(self._units)) >= MIN_UNITS

    def _has_tail(self, percent: float) -> bool:
        return min(percent, 100.0 - percent) / 100.0 * len(self._values) >= MIN_BEYOND

    def _percentiles(self, counts: Counts, shares: Values) -> Iterator[Values]:
        """[shares, draws], in chunks of draws. Values are sorted: ranks are sums of weights."""
        num_rows = max(1, _CHUNK // len(self._values))
        for start in range(0, len(counts), num_rows):
            ranks = np.cumsum(counts[start : start + num_rows, self._units], axis=1)
            position = shares * np.maximum(ranks[:, -1:] - 1, 0)  # [draws, shares]
            lower = np.floor(position)
            below, above = (self._at(ranks, rank) for rank in (lower, np.ceil(position)))
            yield (below + (above - below) * (position - lower)).T

    def _at(self, ranks: Counts, wanted: Values) -> Values:
        places = [
            row.searchsorted(rank, side="right") for row, rank in zip(ranks, wanted, strict=True)
        ]
        return np.asarray(self._values[np.minimum(places, len(self._values) - 1)])


def block_counts(num_units: int, *, num_draws: int = 1000, seed: int = 0) -> Counts:
    """How often each unit occurs in each draw: [num_draws, num_units], rows add up to num_units."""
    length = max(1, round(num_units ** (1 / 3)))
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, num_units, (num_draws, -(-num_units // length), 1))
    drawn = ((starts + np.arange(length)) % num_units).reshape(num_draws, -1)[:, :num_units]
    flat = drawn + num_units * np.arange(num_draws)[:, None]
    counts = np.bincount(flat.ravel(), minlength=num_draws * num_units)
    return np.asarray(counts.reshape(num_draws, num_units))


def ratio_of_intervals(over: tuple[float, Interval], under: tuple[float, Interval]) -> Ratio:
    """`over` / `under` of one run each, from the figures' own intervals; all above 0.

    Each interval is taken as that of a normal logarithm; what moves from run to run is not in it.
    """
    normal = NormalDist().inv_cdf(1.0 - _TAIL)
    halves = [math.log(i.high / i.low) / 2.0 for _, i in (over, under)]
    return _ratio(math.log(over[0] / under[0]), math.hypot(*halves) / normal, normal)


def mean_of_runs(runs: Sequence[float]) -> tuple[float, Interval | None]:
    """Geometric mean of figures above 0, and where it would lie; None: one run says nothing of it.

    Of ratios taken within rounds it is the ratio of two contenders: what changed from round to
    round has met both.
    """
    logs = [math.log(figure) for figure in runs]
    mean = fmean(logs)
    if len(logs) < 2:
        return math.exp(mean), None
    error = math.sqrt(variance(logs) / len(logs))
    ratio = _ratio(mean, error, _student_quantile(len(logs) - 1.0))
    return ratio.value, ratio.interval


def ratio_of_runs(over: Sequence[float], under: Sequence[float]) -> Ratio:
    """Geometric means of at least two runs each: `over` / `under`; all figures above 0."""
    logs = [[math.log(figure) for figure in runs] for runs in (over, under)]
    parts = [variance(values) / len(values) for values in logs]
    error = math.sqrt(sum(parts))
    freedom = error**4 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, logs, strict=True)
    ) if error else 1.0  # fmt: skip
    return _ratio(fmean(logs[0]) - fmean(logs[1]), error, _student_quantile(freedom))


def _ratio(log: float, error: float, quantile: float) -> Ratio:
    low, high = (math.exp(log + sign * quantile * error) for sign in (-1, 1))
    return Ratio(math.exp(log), Interval(low, high))


def _interval(draws: Values) -> Interval:
    low, high = np.quantile(draws, [_TAIL, 1.0 - _TAIL])
    return Interval(float(low), float(high))


def _student_quantile(freedom: float) -> float:
    """The t distribution's 97.5 % quantile: x = sqrt(f) tan(a), whose density is cos(a)^(f - 1)."""
    angles = np.linspace(0.0, math.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1.0)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    angle = float(np.interp(CONFIDENCE, mass / mass[-1], angles))
    return math.sqrt(freedom) * math.tan(angle)
