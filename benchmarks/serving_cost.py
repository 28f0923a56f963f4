"""What serving adds to the engine's steps, on a machine that server and client share.

    seconds of a served step = engine * (1 + slowdown) + step + token * T + request * R + prompt * P

`engine` is what the step takes alone (`cost_model.py`), T the tokens that it draws in all its
rounds, R the requests that enter with it, P the tokens of prompts that it computes. A step's
message, each token's event on its way through API process, socket and client, each request's
parsing and its prompt's tokenizing cost processor time, which on few cores is the engine's; where
its threads wait for one another beside other processes, the step itself takes longer.

And a request takes `entry` seconds to come to the engine, which goes on meanwhile where others keep
it busy: with one at a time that is waiting, with many it costs nothing.

The coefficients come from short closed loops over HTTP: what these took beyond the simulated engine
is a sum over the same counts, so non-negative least squares finds it. The counts depend on the
costs (who enters while others decode), so simulation and fit are repeated until they agree. `entry`
is the one of a few times that leaves the least error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from llmserve.runners.protocol import Batch

from .cost_fit import non_negative_least_squares
from .cost_model import CostModel
from .equal_requests import ClosedLoop
from .simulator import SimulatedEngine, simulate

__all__ = ["MeasuredLoop", "ServedSteps", "ServingCost", "ServingFit", "fit_serving_cost"]

ITERATIONS = 8
"""Of simulation and fit with the first time to come to the engine, and with the best; ..."""
MORE_ITERATIONS = 3
"""... with each of the others, from the costs found before."""
ENTRIES_S = (0.0, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
"""Times to come to the engine that are tried; 0.25 to 2 ms were found (docs/planning.md)."""

Counts = tuple[float, int, int, int, int]
"""Seconds of the engine alone, steps, tokens drawn, requests, and tokens of prompts of which none
is drawn: what the costs of `ServingCost` are for, in their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingCost:
    """Coefficients, none below 0; all 0: the engine alone."""

    slowdown: float = 0.0
    """Share of the engine's own time that comes on top of it."""
    step_s: float = 0.0
    """For each step."""
    token_s: float = 0.0
    """For each token drawn: they are events of their own also where a step draws several."""
    request_s: float = 0.0
    """For each request."""
    prompt_token_s: float = 0.0
    """For each token of a prompt, but its last."""
    entry_s: float = 0.0
    """From a request's sending to its place in the engine's queue."""

    def outside(self) -> dict[str, float]:
        """With the units of a cost model's names."""
        return {
            "slowdown": self.slowdown,
            "step_ms": 1e3 * self.step_s,
            "token_us": 1e6 * self.token_s,
            "request_ms": 1e3 * self.request_s,
            "prompt_token_us": 1e6 * self.prompt_token_s,
            "entry_ms": 1e3 * self.entry_s,
        }

    def __str__(self) -> str:
        return ",".join(f"{name}={value:.4g}" for name, value in self.outside().items())


class ServedSteps:
    """What steps take in a server, and a count of what was in them. Implements `StepLaw`."""

    def __init__(self, engine: CostModel, serving: ServingCost) -> None:
        self.engine, self.serving = engine, serving
        self.counts: Counts = (0.0, 0, 0, 0, 0)
        """So far."""

    def seconds(self, batch: Batch) -> float:
        """Of one step."""
        engine_s = self.engine.seconds(batch)
        num_tokens = len(batch.logits_indices) * batch.num_rounds
        # A sequence whose first position is computed has just entered.
        num_entered = int((batch.positions[batch.cu_seqlens[:-1]] == 0).sum())
        num_read = batch.num_tokens - len(batch.logits_indices)
        before_s, steps, tokens, entered, read = self.counts
        self.counts = (
            *(before_s + engine_s, steps + 1),
            *(tokens + num_tokens, entered + num_entered, read + num_read),
        )
        cost = self.serving
        extra_s = cost.step_s + cost.token_s * num_tokens + cost.request_s * num_entered
        extra_s += cost.prompt_token_s * num_read
        return engine_s * (1.0 + cost.slowdown) + extra_s


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLoop:
    """A closed loop as a server really answered it."""

    loop: ClosedLoop
    duration_s: float
    """From the first send to the last end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingFit:
    """What was found, and how far it is from what was measured."""

    cost: ServingCost
    measured: tuple[MeasuredLoop, ...]
    """What it was fitted to."""
    errors: tuple[float, ...]
    """Predicted over measured duration of each loop, minus 1."""

    def __str__(self) -> str:
        worst = max(map(abs, self.errors))
        median = float(np.median(np.abs(self.errors)))
        return (
            f"{self.cost}\nfitted to {len(self.errors)} short loads of the server; error of their "
            f"durations: median {median:.1%}, at most {worst:.1%}"
        )


def fit_serving_cost(
    engine: SimulatedEngine, cost: CostModel, measured: Sequence[MeasuredLoop]
) -> ServingFit:
    """The serving cost under which simulations of the loops last as long as `measured` says.

    `engine` gives the sizes, `cost` what its steps take alone. Errors count relative to a loop's
    duration, so that short ones count as much as long ones.
    """
    fits = [_fit(engine, cost, measured, ServingCost(), ITERATIONS)]
    for entry_s in ENTRIES_S[1:]:
        start = replace(fits[-1].cost, entry_s=entry_s)
        fits.append(_fit(engine, cost, measured, start, MORE_ITERATIONS))
    best = min(fits, key=_squares)
    return min(best, _fit(engine, cost, measured, best.cost, ITERATIONS), key=_squares)


def _squares(fit: ServingFit) -> float:
    return sum(error**2 for error in fit.errors)


def _fit(
    engine: SimulatedEngine,
    cost: CostModel,
    measured: Sequence[MeasuredLoop],
    serving: ServingCost,
    iterations: int,
) -> ServingFit:
    """From `serving`, whose time to come to the engine stays as it is."""
    seconds = np.array([item.duration_s for item in measured])
    for _ in range(iterations):
        played = [_played(engine, cost, serving, item.loop) for item in measured]
        counts = np.array([item for item, _ in played])
        idle_s = np.array([item for _, item in played])
        found = non_negative_least_squares(
            counts / seconds[:, None], (seconds - idle_s - counts[:, 0]) / seconds
        )
        serving = ServingCost(
            **dict(zip(asdict(serving), found.tolist(), strict=False)), entry_s=serving.entry_s
        )
    errors = (idle_s + counts[:, 0] + counts @ found) / seconds - 1.0
    return ServingFit(cost=serving, measured=tuple(measured), errors=tuple(errors.tolist()))


def _played(
    engine: SimulatedEngine, cost: CostModel, serving: ServingCost, loop: ClosedLoop
) -> tuple[Counts, float]:
    """What was in the steps of `loop`, and the seconds between them."""
    steps = ServedSteps(cost, serving)
    simulation = simulate(
        loop.requests,
        loop.requests.size(engine.block_size),
        replace(engine, cost=steps, entry_s=serving.entry_s),
        max_concurrency=loop.max_concurrency,
    )
    return steps.counts, simulation.duration_s - simulation.busy_s
