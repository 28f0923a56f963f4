"""What a plan is asked, and what it found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmserve.errors import ConfigError

from .capacity import CapacityOptions
from .cost_fit import CostFit
from .equal_requests import ClosedLoop
from .plan_predict import Knee, LoopFigures
from .serving_cost import ServingFit

__all__ = ["Plan", "PlanOptions", "PlannedLoop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """Model, server, load and objectives."""

    model: Path
    slos_ms: Mapping[str, float]
    attainment: float = 0.9
    input_len: int = 128
    output_len: int = 128
    concurrency: tuple[int, ...] = (1, 4, 16, 64)
    """Requests at a time to be predicted."""
    max_num_seqs: int = 64
    max_batched_tokens: int = 512
    runner: str = "auto"
    threads: int | None = None
    probe_s: float = 10.0
    """Seconds in which the requests of a rate are due, in the simulator and in the check."""
    run_s: float = 5.0
    """Seconds of a closed loop, about."""
    fit_s: float = 20.0
    """Seconds after which no further load is timed in the engine."""
    is_checked: bool = False
    """Whether the server is put to the loads that are predicted."""

    def __post_init__(self) -> None:
        for option, count in (
            ("--input-len", self.input_len),
            ("--output-len", self.output_len),
            ("--max-num-seqs", self.max_num_seqs),
            ("--max-num-batched-tokens", self.max_batched_tokens),
        ):
            if count < 1:
                raise ConfigError(f"{option} must be at least 1, got {count}")
        for option, seconds in (("--run-seconds", self.run_s), ("--fit-seconds", self.fit_s)):
            if not 0 < seconds < math.inf:
                raise ConfigError(f"{option} must be above 0, got {seconds:g}")
        self.wanted(start_rate=1.0)

    @property
    def serve_arguments(self) -> tuple[str, ...]:
        """Of the `llmserve serve` that is planned."""
        sizes = (self.max_num_seqs, self.max_batched_tokens)
        found = [str(self.model), "--max-num-seqs", str(sizes[0])]
        found += ["--max-num-batched-tokens", str(sizes[1])]
        if self.runner != "auto":
            found += ["--runner", self.runner]
        if self.threads is not None:
            found += ["--threads", str(self.threads)]
        return tuple(found)

    def wanted(self, *, start_rate: float) -> CapacityOptions:
        """The search for the knee, begun at a rate. Raises `ConfigError`."""
        return CapacityOptions(
            slos_ms=self.slos_ms,
            attainment=self.attainment,
            start_rate=start_rate,
            probe_s=self.probe_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLoop:
    """One number of requests at a time."""

    loop: ClosedLoop
    predicted: LoopFigures
    measured: LoopFigures | None = None

    @property
    def miss(self) -> float | None:
        """Predicted over measured tokens/s, minus 1."""
        if self.measured is None:
            return None
        return self.predicted.output_throughput / self.measured.output_throughput - 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that was found."""

    executed_form: str
    engine: CostFit
    serving: ServingFit
    loops: tuple[PlannedLoop, ...]
    knee: Knee
    """Predicted."""
    measured_knee: Knee | None = None

    @property
    def knee_miss(self) -> float | None:
        """Predicted over measured highest rate, minus 1; None: not both were found."""
        measured = None if self.measured_knee is None else self.measured_knee.rate
        if self.knee.rate is None or measured is None:
            return None
        return self.knee.rate / measured - 1.0
