"""`llmserve plan`: predict what a model's server will carry on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from llmserve.errors import ConfigError

from .cli_load_options import add_objective_arguments

if TYPE_CHECKING:
    from .plan_options import PlanOptions

__all__ = ["add_arguments", "run"]

DESCRIPTION = """\
Predict what a server of a model will carry on this machine: tokens/s and latency at numbers of
requests at a time, and the highest rate of requests that meets objectives. Times the engine's steps
and a few short loads of a server, whose client shares the machine as here, and asks the simulator.
Takes about a minute. --check then puts the server to what was predicted and prints the misses.

Prints a table and, as the last line, one JSON document.
"""

EXAMPLES = """\
examples:
  llmserve plan run/model-int8 --slo ttft:500,tpot:50
  llmserve plan run/model-int8 --slo ttft:500,tpot:50 --input-len 256 --output-len 64 --check
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument("model", metavar="MODEL", type=Path, help="a model folder")
    _add_load(parser)
    _add_server(parser)
    group = parser.add_argument_group("effort")
    group.add_argument(
        "--check", action="store_true", help="measure what was predicted, and print the misses"
    )
    group.add_argument(
        "--probe-seconds",
        metavar="S",
        type=float,
        default=10.0,
        help="seconds in which a rate's requests are due, at least 20 of them (default: 10)",
    )
    group.add_argument(
        "--run-seconds",
        metavar="S",
        type=float,
        default=5.0,
        help="seconds of each --concurrency, about (default: 5)",
    )
    group.add_argument(
        "--fit-seconds",
        metavar="S",
        type=float,
        default=20.0,
        help="seconds after which no more of the engine's loads are timed (default: 20)",
    )


def run(args: argparse.Namespace) -> int:
    """Plan; the exit code."""
    from .plan import bench_plan

    return bench_plan(_options(args))


def _add_load(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load")
    add_objective_arguments(group)
    group.add_argument(
        "--input-len", metavar="N", type=int, default=128, help="tokens of a prompt (default: 128)"
    )
    group.add_argument(
        "--output-len", metavar="N", type=int, default=128, help="of an answer (default: 128)"
    )
    group.add_argument(
        "--concurrency",
        metavar="N,N",
        default="1,4,16,64",
        help="requests at a time to predict (default: 1,4,16,64)",
    )


def _add_server(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument(
        "--max-num-seqs",
        metavar="COUNT",
        type=int,
        default=64,
        help="most sequences in one step (default: 64)",
    )
    group.add_argument(
        "--max-num-batched-tokens",
        metavar="TOKENS",
        type=int,
        default=512,
        help="most tokens in one step (default: 512)",
    )
    group.add_argument(
        "--runner", default="auto", help="auto, native, torch or onnx (default: auto)"
    )
    group.add_argument("--threads", type=int, help="threads for one step (default: all cores)")


def _options(args: argparse.Namespace) -> PlanOptions:
    from .metrics import parse_slos
    from .plan_options import PlanOptions

    return PlanOptions(
        model=args.model,
        slos_ms=parse_slos(args.slo.split(","), option="--slo"),
        attainment=args.attainment,
        input_len=args.input_len,
        output_len=args.output_len,
        concurrency=_counts(args.concurrency),
        max_num_seqs=args.max_num_seqs,
        max_batched_tokens=args.max_num_batched_tokens,
        runner=args.runner,
        threads=args.threads,
        probe_s=args.probe_seconds,
        run_s=args.run_seconds,
        fit_s=args.fit_seconds,
        is_checked=args.check,
    )


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise ConfigError(f"--concurrency takes whole numbers above 0 like 1,4,16, got {text!r}")
    return counts
