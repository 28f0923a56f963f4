"""`llmserve bench latency` and `bench startup`: what a model costs by its load and at its start."""

from __future__ import annotations

import argparse
from pathlib import Path

from .cli_verbs import Verbs, add_verb

__all__ = ["add_cost_verbs"]

LATENCY_DESCRIPTION = """\
Time one model in this process: the prefill of a prompt by its length, and a decode step by the
number of sequences and the length of their contexts. Settings take turns in each repeat, prompts
are new each time; medians. Beside them what share they are of the device's limits, measured before:
bytes that a step must read over the memory's rate, and on a GPU a prefill's multiply-adds over that
of large matrices. The last line is one JSON document.
"""

LATENCY_EXAMPLES = """\
examples:
  llmserve bench latency models/M-int4
  llmserve bench latency models/M --sequences 1,16 --contexts 64,1024 --runner torch
  llmserve bench latency models/XL --device cuda --sequences 1,64 --contexts 1024
"""

STARTUP_DESCRIPTION = """\
Measure what it takes until the first token: the size of the installed packages, the time to import
them, and for a server in processes of its own the time from its start to its first answer and first
token, with its resident memory. Medians of --repeats starts. The last line is one JSON document.

An installation from a checkout (pip install -e) counts no file of llmserve itself.
"""

STARTUP_EXAMPLES = """\
examples:
  llmserve bench startup models/demo-int8
  llmserve bench startup models/demo -- --runner torch
"""


def add_cost_verbs(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Declare both verbs and their options."""
    latency = add_verb(
        verbs, "latency", "time prefill and decode", LATENCY_DESCRIPTION, LATENCY_EXAMPLES
    )
    _add_latency(latency)
    latency.set_defaults(sub_run=_run_latency)
    startup = add_verb(
        verbs, "startup", "from start to first token", STARTUP_DESCRIPTION, STARTUP_EXAMPLES
    )
    startup.add_argument("model", metavar="MODEL", type=Path, help="a model folder")
    startup.add_argument("--repeats", metavar="N", type=int, default=3, help="starts (default: 3)")
    startup.add_argument(
        "arguments", metavar="OPTION", nargs="*", help="after --: more for llmserve serve"
    )
    startup.set_defaults(sub_run=_run_startup)


def _run_latency(args: argparse.Namespace) -> int:
    from .latency import LatencyOptions, bench_latency, parse_counts

    options = LatencyOptions(
        model=args.model,
        runner=args.runner,
        threads=args.threads,
        device=args.device,
        dtype=args.dtype,
        sequences=parse_counts(args.sequences, option="--sequences"),
        contexts=parse_counts(args.contexts, option="--contexts"),
        repeats=args.repeats,
        seed=args.seed,
    )
    return bench_latency(options)


def _run_startup(args: argparse.Namespace) -> int:
    from .startup import StartupOptions, bench_startup

    return bench_startup(
        StartupOptions(model=args.model, repeats=args.repeats, arguments=tuple(args.arguments))
    )


def _add_latency(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a model folder")
    parser.add_argument("--runner", metavar="NAME", default="auto", help="(default: auto)")
    parser.add_argument(
        "--threads", metavar="N", type=int, help="threads of a step (default: the runner's choice)"
    )
    parser.add_argument(
        "--device", metavar="NAME", default="cpu", help="cpu, cuda or cuda:N (default: cpu)"
    )
    parser.add_argument(
        "--dtype", metavar="NAME", help="type of the arithmetic (default: as the folder says)"
    )
    parser.add_argument(
        "--sequences",
        metavar="N,N",
        default="1,8,32",
        help="decoded together (default: %(default)s)",
    )
    parser.add_argument(
        "--contexts",
        metavar="N,N",
        default="128,512,1024",
        help="tokens of a prompt, and there before a step (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats", metavar="N", type=int, default=3, help="runs of each (default: 3)"
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of the prompts (default: 0)"
    )
