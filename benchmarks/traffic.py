"""How the requests of a load test come: at a rate, on a ramp, in steps, or as recorded."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from llmserve.errors import ConfigError

from .arrivals import Ramp, Steps
from .cli_trace import trace_from
from .traces import Trace

__all__ = ["Traffic", "traffic_from"]

DEFAULT_NUM_PROMPTS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """How many requests come, and when. Made by `traffic_from`."""

    num_prompts: int = DEFAULT_NUM_PROMPTS
    request_rate: float | Ramp | Steps = math.inf
    """Requests per second."""
    burstiness: float = 1.0
    """Shape of the gamma distributed gaps."""
    max_concurrency: int | None = None
    """Most requests under way; None: no limit."""
    trace: Trace | None = None
    """Lengths and times come from it; None: from the other fields."""

    @property
    def is_open_loop(self) -> bool:
        """Whether requests are due at times fixed beforehand."""
        is_timed = self.trace is not None or self.request_rate != math.inf
        return is_timed or self.max_concurrency is None

    def __str__(self) -> str:
        if not self.is_open_loop:
            return f"closed loop: {self.max_concurrency} at a time"
        capped = f", at most {self.max_concurrency} at a time" if self.max_concurrency else ""
        return f"open loop: {self._arrivals()}{capped}"

    def _arrivals(self) -> str:
        if self.trace is not None:
            scale = self.trace.options
            return (
                f"{self.trace.path.name}, times / {scale.time_scale:g}, "
                f"lengths x {float(scale.length_scale):g}"
            )
        if self.request_rate == math.inf:
            return "every request due at once"
        shape = "Poisson" if self.burstiness == 1 else f"gamma, shape {self.burstiness:g}"
        if isinstance(self.request_rate, Ramp | Steps):
            return f"{self.request_rate} ({shape})"
        return f"{self.request_rate:g} requests/s ({shape})"


def traffic_from(args: argparse.Namespace) -> Traffic:
    """The traffic behind the arguments of the command line.

    Raises:
        ConfigError: a value out of range, or options that exclude each other.
        DataError: the trace cannot be read.
    """
    _check_unused(args)
    rate = _rate(args)
    trace = None if args.trace is None else trace_from(args)
    count = args.num_prompts
    if count is None:
        count = rate.num_requests if isinstance(rate, Steps) else DEFAULT_NUM_PROMPTS
    if trace is not None:
        count = trace.size(1).num_requests
    for name, value in (("--num-prompts", count), ("--max-concurrency", args.max_concurrency)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    return Traffic(
        num_prompts=count,
        request_rate=rate,
        burstiness=1.0 if args.burstiness is None else args.burstiness,
        max_concurrency=args.max_concurrency,
        trace=trace,
    )


def _rate(args: argparse.Namespace) -> float | Ramp | Steps:
    if args.ramp_up_strategy is not None:
        return Ramp(
            strategy=args.ramp_up_strategy,
            start=args.ramp_up_start_rps,
            end=args.ramp_up_end_rps,
        )
    if args.rate_steps is not None:
        return _steps(args.rate_steps)
    rate: float = args.request_rate
    return rate


def _steps(text: str) -> Steps:
    try:
        pairs = [tuple(map(float, step.split(":"))) for step in text.split(",")]
        rates, seconds = zip(*((rate, length) for rate, length in pairs), strict=True)
    except ValueError:
        raise ConfigError(
            f"--rate-steps takes RATE:SECONDS,RATE:SECONDS, as 2:30,4:30, got {text!r}"
        ) from None
    return Steps(rates=rates, seconds=seconds)


def _check_unused(args: argparse.Namespace) -> None:
    """Refuse options that the others leave without effect."""
    is_ramp = args.ramp_up_strategy is not None
    ends = (args.ramp_up_start_rps, args.ramp_up_end_rps)
    shapes = {
        "--request-rate": math.isfinite(args.request_rate),
        "--ramp-up-strategy": is_ramp,
        "--rate-steps": args.rate_steps is not None,
        "--trace": args.trace is not None,
    }
    given = [name for name, is_given in shapes.items() if is_given]
    is_trace_part = (
        args.trace_format is not None
        or args.time_scale != 1
        or args.length_scale != "1"
        or args.num_requests is not None
        or args.start != 0
        or args.every != 1
    )
    has_count = args.num_prompts is not None
    rules = [
        (len(given) > 1, f"give one of {', '.join(given)}"),
        (is_ramp and None in ends, "a ramp needs --ramp-up-start-rps and --ramp-up-end-rps"),
        (
            not is_ramp and ends != (None, None),
            "--ramp-up-start-rps and --ramp-up-end-rps need --ramp-up-strategy",
        ),
        (has_count and args.rate_steps, "--rate-steps say how many requests: no --num-prompts"),
        (has_count and args.trace, "with --trace give --num-requests, not --num-prompts"),
        (is_trace_part and not args.trace, "give --trace FILE with the options of a trace"),
        (
            args.burstiness is not None and (not given or args.trace),
            "--burstiness needs a finite --request-rate, a ramp or steps",
        ),
    ]
    for is_broken, message in rules:
        if is_broken:
            raise ConfigError(message)
