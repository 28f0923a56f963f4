"""`llmserve simulate`: replay a trace on the engine with a virtual clock."""

from __future__ import annotations

import argparse
from pathlib import Path

from .cli_trace import add_trace_arguments

__all__ = ["add_arguments", "run"]

DESCRIPTION = """\
Replay recorded traffic on the engine itself, with a virtual clock and a model of what a step
costs in place of a language model: an hour in seconds. Reports TTFT, TPOT, goodput, the prefix
cache's hit rate and preemptions.

Prints a table and, as the last line, one JSON document.
"""

EXAMPLES = """\
examples:
  llmserve simulate --trace conversation_trace.jsonl --cost-model base_ms=10,token_us=12 \\
      --goodput ttft:2000 tpot:50
  llmserve simulate --trace conversation_trace.jsonl --cost-model costs.json \\
      --sweep-cache 1000,4000,16000,unbounded
  llmserve simulate --trace AzureLLMInferenceTrace_conv.csv --cost-model fit:run/model \\
      --length-scale 1/32 --save-cost-model costs.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    add_trace_arguments(parser)
    _add_machine(parser)
    _add_engine(parser)
    parser.add_argument(
        "--goodput",
        metavar="NAME:MS",
        nargs="+",
        default=[],
        help="objectives: ttft, tpot, e2el in milliseconds; counts requests that meet all",
    )


def run(args: argparse.Namespace) -> int:
    """Simulate; the exit code."""
    from .simulate import run_simulations
    from .simulation_options import simulation_options

    return run_simulations(simulation_options(args))


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cost of a step")
    group.add_argument(
        "--cost-model",
        metavar="COSTS",
        required=True,
        help="base_ms=..,token_us=..,seq_us=..,context_ns=..,pair_ns=..,step_ms=.. (what is left "
        "out is 0), a JSON file with these names, or fit:MODEL_FOLDER to time that model here",
    )
    group.add_argument(
        "--save-cost-model", metavar="FILE", type=Path, help="fit: keep the costs, as JSON"
    )
    group.add_argument("--device", help="fit: cpu, cuda or cuda:N (default: cpu)")
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="fit: type of the arithmetic (default: the folder's)",
    )


def _add_engine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--kv-cache-blocks", metavar="N", help="KV blocks, or unbounded (default: unbounded)"
    )
    group.add_argument(
        "--sweep-cache", metavar="N,N", help="one run for each number of KV blocks, or unbounded"
    )
    group.add_argument(
        "--block-size",
        metavar="TOKENS",
        type=int,
        help="tokens in a KV block (default: the trace's, if it names blocks, else 16)",
    )
    group.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="share blocks between requests with equal beginnings (default: on)",
    )
    group.add_argument(
        "--max-num-seqs",
        metavar="COUNT",
        type=int,
        default=64,
        help="most sequences running at once (default: 64)",
    )
    group.add_argument(
        "--max-num-batched-tokens",
        metavar="TOKENS",
        type=int,
        default=512,
        help="most tokens in a step (default: 512)",
    )
    group.add_argument(
        "--scheduling-policy",
        choices=("fcfs", "priority", "fair"),
        default="fcfs",
        help="who is served first; priority and fair look at the trace's priority and tenant "
        "(default: fcfs)",
    )
