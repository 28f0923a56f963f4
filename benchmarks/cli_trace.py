"""The options that name a trace and say what of it is used; one place for all that replay one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from llmserve.errors import ConfigError

if TYPE_CHECKING:
    from .traces import Trace

__all__ = ["add_trace_arguments", "trace_from"]


def add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    group = parser.add_argument_group("trace")
    group.add_argument("--trace", metavar="FILE", type=Path, help="recorded traffic")
    group.add_argument(
        "--trace-format",
        choices=("azure", "mooncake"),
        help="azure: CSV; mooncake: JSON lines with block hashes (default: by the first line)",
    )
    group.add_argument(
        "--time-scale",
        metavar="X",
        type=float,
        default=1.0,
        help="2: requests come twice as fast (default: 1)",
    )
    group.add_argument(
        "--length-scale",
        metavar="X",
        default="1",
        help="lengths times this, rounded up, as 0.1 or 1/16 (default: 1)",
    )
    group.add_argument(
        "--num-requests", metavar="N", type=int, help="the first N requests only (default: all)"
    )
    group.add_argument(
        "--every",
        metavar="N",
        type=int,
        default=1,
        help="one of N requests only: the same ups and downs at a lower rate (default: 1)",
    )
    group.add_argument(
        "--start",
        metavar="S",
        type=float,
        default=0.0,
        help="pass over requests before this second of the trace (default: 0)",
    )


def trace_from(args: argparse.Namespace) -> Trace:
    """The trace behind the arguments; `args.trace` is not None.

    Raises:
        ConfigError: a value out of range.
        DataError: the file cannot be read, or begins like no trace.
    """
    from fractions import Fraction

    from .traces import TraceOptions, open_trace

    try:
        length_scale = Fraction(args.length_scale)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(
            f"--length-scale takes a number like 0.1 or 1/16, got {args.length_scale!r}"
        ) from None
    options = TraceOptions(
        time_scale=args.time_scale,
        length_scale=length_scale,
        num_requests=args.num_requests,
        start_s=args.start,
        every=args.every,
    )
    return open_trace(args.trace, options, trace_format=args.trace_format)
