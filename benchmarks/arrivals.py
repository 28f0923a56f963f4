"""When requests are meant to be sent: an open-loop schedule fixed before the run.

Open loop: users come whether or not the server keeps up, so the times are drawn beforehand and
never move; latency is counted from them. A closed loop has no schedule: each of N clients sends
its next request when its last was answered (`load.py`).

The rate is a number, or changes along the run: a `Ramp`, or `Steps`. Times of a constant rate of 1
are stretched so that each piece of the run holds as many requests as its rate says.

Gaps are gamma distributed with mean 1/rate and shape `burstiness`: 1 is a Poisson process, below
1 burstier, above 1 more even; the squared coefficient of variation of a gap is 1/burstiness.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from llmserve.errors import ConfigError

__all__ = ["Ramp", "Steps", "arrival_offsets"]

Offsets = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ramp:
    """A rate that goes steadily from `start` to `end` requests/s over the whole run."""

    strategy: Literal["linear", "exponential"]
    """By equal differences or by equal factors in equal times."""
    start: float
    """Requests/s; above 0 for an exponential ramp."""
    end: float

    def __post_init__(self) -> None:
        least = min(self.start, self.end)
        is_too_low = least < 0 or (self.strategy == "exponential" and least == 0)
        if is_too_low or not 0 < self.start + self.end < math.inf:
            raise ConfigError(
                f"a ramp goes between finite rates of at least 0 requests/s (exponential: above "
                f"0), got {self.start:g} to {self.end:g}"
            )

    def __str__(self) -> str:
        return f"{self.strategy} ramp from {self.start:g} to {self.end:g} requests/s"

    def due(self, numbers: Offsets) -> Offsets:
        """When the rate's integral reaches each of `numbers`, the last of which ends the ramp."""
        if self.start == self.end:
            return numbers / self.start
        if self.strategy == "exponential":
            # start exp(g t) integrates to start (exp(g t) - 1) / g, with g (end - start) / last.
            growth = (self.end - self.start) / numbers[-1]
            return np.asarray(np.log1p(numbers * growth / self.start) / growth)
        # start t + slope t^2 / 2 = number, in the form that loses nothing to cancellation.
        slope = (self.end**2 - self.start**2) / (2.0 * numbers[-1])
        root = np.sqrt(np.maximum(self.start**2 + 2.0 * slope * numbers, 0.0))
        return np.asarray(2.0 * numbers / (self.start + root))


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Constant rates, one after the other."""

    rates: tuple[float, ...]
    """Requests/s of each step; 0 is a pause."""
    seconds: tuple[float, ...]
    """Length of each step."""

    def __post_init__(self) -> None:
        steps = list(zip(self.rates, self.seconds, strict=True))
        if not all(0 <= rate < math.inf and 0 < length < math.inf for rate, length in steps):
            raise ConfigError(
                f"steps need finite rates of at least 0 requests/s and lengths above 0 s, got "
                f"{self}"
            )
        if self.num_requests < 1:
            raise ConfigError(f"the steps hold not one request: {self}")

    def __str__(self) -> str:
        steps = zip(self.rates, self.seconds, strict=True)
        return ", then ".join(f"{rate:g} requests/s for {length:g} s" for rate, length in steps)

    @property
    def num_requests(self) -> int:
        """Requests of all steps together."""
        return round(sum(r * s for r, s in zip(self.rates, self.seconds, strict=True)))

    def due(self, numbers: Offsets) -> Offsets:
        """When the rate's integral reaches each of `numbers`."""
        times = np.concatenate([[0.0], np.cumsum(self.seconds)])
        reached = np.concatenate([[0.0], np.cumsum(np.multiply(self.rates, self.seconds))])
        # The first step whose end reaches the number: never a pause, which adds nothing to it.
        step = np.minimum(np.searchsorted(reached[1:], numbers), np.flatnonzero(self.rates)[-1])
        return np.asarray(times[step] + (numbers - reached[step]) / np.take(self.rates, step))


def arrival_offsets(
    count: int, *, request_rate: float | Ramp | Steps, burstiness: float, seed: int
) -> Offsets:
    """Seconds from the start of the run at which each of `count` requests is due, ascending.

    An infinite rate puts all of them at 0. Otherwise the gaps are stretched by one factor so that
    the last request is due at exactly `count / request_rate`, or the end of the ramp: two seeds
    then offer the same load, and only its unevenness differs (as in `vllm bench serve`).

    Raises:
        ConfigError: `request_rate` or `burstiness` is not above 0, or `burstiness` is infinite.
    """
    if isinstance(request_rate, int | float) and not request_rate > 0:
        raise ConfigError(f"the request rate must be above 0 requests/s, got {request_rate:g}")
    if not 0 < burstiness < math.inf:
        raise ConfigError(f"burstiness must be a finite number above 0, got {burstiness:g}")
    if request_rate == math.inf or count == 0:
        return np.zeros(count)
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.gamma(shape=burstiness, scale=1.0 / burstiness, size=count))
    if not times[-1] > 0:  # a shape near 0 draws gaps too small for a float
        raise ConfigError(f"burstiness {burstiness:g} is too close to 0 to draw gaps from")
    numbers = times * (count / times[-1])
    if isinstance(request_rate, Ramp | Steps):
        return request_rate.due(numbers)
    return np.asarray(numbers / request_rate)
