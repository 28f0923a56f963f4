"""`llmserve bench serve` loads a server, `capacity` finds what it carries, `compare` says which of
two load tests was faster, and `client` how much the load generator itself can take."""

from __future__ import annotations

import argparse
from pathlib import Path

from .cli_load_options import (
    add_figures_arguments,
    add_prompts_arguments,
    add_sampling_arguments,
    add_search_arguments,
    add_server_arguments,
    add_traffic_arguments,
)
from .cli_multi_turn import add_conversation_arguments
from .cli_trace import add_trace_arguments
from .cli_verbs import Verbs, add_verb

__all__ = ["add_load_verbs"]

SERVE_DESCRIPTION = """\
Send requests to any OpenAI-compatible server and measure how it answers.

Closed loop: --max-concurrency N with the default rate: N clients, each sending its next request
when its last was answered. Open loop: --request-rate R: requests are due at random times (a
Poisson process) whether or not the server keeps up, and their latency counts from then. So they
are with a ramp, with steps, and with --trace, which also says how long they are.

Prints a table and, as the last line, one JSON document with the keys of `vllm bench serve`.
Exits with 0 when every request succeeded, 1 when some failed, 130 when interrupted (what had
ended by then is still printed). The key is read from OPENAI_API_KEY.
"""

SERVE_EXAMPLES = """\
examples:
  llmserve bench serve --max-concurrency 16 --num-prompts 64
  llmserve bench serve --base-url http://127.0.0.1:8080 --request-rate 4 --num-prompts 200 \\
      --random-input-len 256 --random-output-len 64 --goodput ttft:200 tpot:50
  llmserve bench serve --rate-steps 2:30,4:30,8:30 --random-prefix-len 100
  llmserve bench serve --trace conversation_trace.jsonl --length-scale 1/16 --num-requests 500
  llmserve bench serve --endpoint /v1/chat/completions --dataset-name mt-bench \\
      --dataset-path question.jsonl --multi-turn --think-time 2 --max-concurrency 8
  llmserve bench serve --endpoint /v1/chat/completions --dataset-name text \\
      --dataset-path prompts.txt --max-concurrency 4 --save-result --result-dir results
"""

COMPARE_DESCRIPTION = """\
Say of each figure of two load tests whether B was faster than A, how many times, and how sure that
is. A and B are results of `bench serve --save-result`, or folders of them: the more runs of each,
taken in turn, the smaller the differences that can be shown.

The last line is one JSON document. Exits with 0 whatever the verdict.
"""

COMPARE_EXAMPLES = """\
examples:
  llmserve bench compare before.json after.json
  llmserve bench compare runs-before runs-after
"""


CAPACITY_DESCRIPTION = """\
Find the highest rate of requests at which a server still meets its objectives: open-loop load tests
at rates that double, and then close in on the knee from both sides. A rate meets the objectives
when --attainment of its requests do, counted from their intended send; failed requests do not.

Prints every rate tried and, as the last line, one JSON document. Exits with 0 when a rate was
found, 1 when none tried meets the objectives, 130 when interrupted.
"""

CAPACITY_EXAMPLES = """\
examples:
  llmserve bench capacity --slo ttft:500,tpot:50
  llmserve bench capacity --slo e2el:5000 --start-rate 4 --input-len 256 --output-len 64
"""

CLIENT_DESCRIPTION = """\
Measure the load generator itself: a server that only streams, one token in each chunk, sends from
another process and core at rates that rise, until the client no longer keeps up. It keeps up while
all tokens come and its event loop wakes at most 10 ms late in 99 of 100 looks.

The last line is one JSON document. Exits with 0 when it kept a rate, 1 when it kept none.
"""

CLIENT_EXAMPLES = """\
examples:
  llmserve bench client
  llmserve bench client --rates 50000 --streams 256 --seconds 20
"""

# A probe's traffic is the search's own; its figures are the share in time and the goodput.
PROBE_DEFAULTS: dict[str, object] = {
    "num_prompts": None,
    "request_rate": float("inf"),
    "max_concurrency": None,
    "ramp_up_strategy": None,
    "ramp_up_start_rps": None,
    "ramp_up_end_rps": None,
    "rate_steps": None,
    "burstiness": None,
    "trace": None,
    "trace_format": None,
    "time_scale": 1.0,
    "length_scale": "1",
    "num_requests": None,
    "start": 0.0,
    "every": 1,
    "percentile_metrics": None,
    "metric_percentiles": "50",
    "goodput": [],
    "save_result": False,
    "save_detailed": False,
    "result_dir": None,
    "result_filename": None,
    "html": None,
    "markdown": None,
    "multi_turn": False,
    "num_turns": None,
    "think_time": 0.0,
    "label": None,
}


def add_load_verbs(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Declare the verbs and their options."""
    serve = add_verb(verbs, "serve", "load-test a server", SERVE_DESCRIPTION, SERVE_EXAMPLES)
    add_server_arguments(serve)
    add_traffic_arguments(serve)
    add_trace_arguments(serve)
    add_prompts_arguments(serve)
    add_conversation_arguments(serve)
    add_sampling_arguments(serve)
    add_figures_arguments(serve)
    serve.set_defaults(sub_run=_run_serve)
    capacity = add_verb(
        verbs, "capacity", "the highest rate in time", CAPACITY_DESCRIPTION, CAPACITY_EXAMPLES
    )
    add_search_arguments(capacity)
    add_server_arguments(capacity)
    add_prompts_arguments(capacity)
    add_sampling_arguments(capacity)
    capacity.set_defaults(sub_run=_run_capacity, **PROBE_DEFAULTS)
    compare = add_verb(
        verbs, "compare", "which load test was faster", COMPARE_DESCRIPTION, COMPARE_EXAMPLES
    )
    compare.add_argument("a", metavar="A", type=Path, help="a result, or a folder of repeated runs")
    compare.add_argument("b", metavar="B", type=Path, help="what it is compared with, alike")
    compare.set_defaults(sub_run=_run_compare)
    client = add_verb(
        verbs, "client", "what the load generator can take", CLIENT_DESCRIPTION, CLIENT_EXAMPLES
    )
    _add_client(client)
    client.set_defaults(sub_run=_run_client)


def _run_serve(args: argparse.Namespace) -> int:
    from .options import options_from
    from .serve import bench_serve

    return bench_serve(options_from(args))


def _run_capacity(args: argparse.Namespace) -> int:
    from .capacity import CapacityOptions, bench_capacity
    from .metrics import parse_slos
    from .options import options_from

    wanted = CapacityOptions(
        slos_ms=parse_slos(args.slo.split(","), option="--slo"),
        attainment=args.attainment,
        start_rate=args.start_rate,
        probe_s=args.probe_seconds,
        tolerance=args.tolerance,
    )
    return bench_capacity(options_from(args), wanted)


def _run_compare(args: argparse.Namespace) -> int:
    from .compare import bench_compare

    return bench_compare(args.a, args.b)


def _run_client(args: argparse.Namespace) -> int:
    from .client_speed import ClientSpeedOptions, bench_client, parse_rates

    options = ClientSpeedOptions(
        rates=parse_rates(args.rates),
        num_streams=args.streams,
        output_len=args.output_len,
        seconds=args.seconds,
    )
    return bench_client(options)


def _add_client(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rates",
        metavar="R,R",
        default="10000,25000,50000,75000,100000",
        help="tokens/s over all streams, one try each (default: %(default)s)",
    )
    parser.add_argument(
        "--streams", metavar="N", type=int, default=256, help="answers at a time (default: 256)"
    )
    parser.add_argument(
        "--output-len",
        metavar="N",
        type=int,
        default=128,
        help="mean tokens of an answer (default: 128)",
    )
    parser.add_argument(
        "--seconds", metavar="S", type=float, default=5.0, help="of each try (default: 5)"
    )
