"""The options of a load test, in the groups in which its verbs share them."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = [
    "add_figures_arguments",
    "add_objective_arguments",
    "add_prompts_arguments",
    "add_sampling_arguments",
    "add_search_arguments",
    "add_server_arguments",
    "add_traffic_arguments",
]


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the server is and what it is asked for."""
    group = parser.add_argument_group("server")
    group.add_argument("--base-url", metavar="URL", help="scheme, host and port, without /v1")
    group.add_argument("--host", help="instead of --base-url (default: 127.0.0.1)")
    group.add_argument(
        "--port", metavar="N", type=int, help="instead of --base-url (default: 8000)"
    )
    group.add_argument(
        "--endpoint",
        choices=("/v1/completions", "/v1/chat/completions"),
        default="/v1/completions",
        help="route to load (default: %(default)s)",
    )
    group.add_argument(
        "--model", metavar="NAME", help="name in requests (default: the first of /v1/models)"
    )
    group.add_argument(
        "--header",
        metavar="NAME=VALUE",
        nargs="+",
        default=[],
        help="headers of each request; they win over OPENAI_API_KEY",
    )
    group.add_argument(
        "--ready-check-timeout-sec",
        metavar="S",
        type=int,
        default=0,
        help="seconds to wait for a server that is not ready yet (default: 0, do not wait)",
    )
    group.add_argument(
        "--request-timeout-sec",
        metavar="S",
        type=float,
        default=600.0,
        help="seconds from a request's send to its end, then it failed (default: 600)",
    )


def add_traffic_arguments(parser: argparse.ArgumentParser) -> None:
    """How many requests come, and when."""
    group = parser.add_argument_group("traffic")
    group.add_argument("--num-prompts", metavar="N", type=int, help="requests (default: 1000)")
    group.add_argument(
        "--num-warmups",
        metavar="N",
        type=int,
        default=0,
        help="requests sent before the clock starts (default: 0; one is always sent)",
    )
    group.add_argument(
        "--max-concurrency",
        metavar="N",
        type=int,
        help="most requests under way at a time (default: no limit)",
    )
    group.add_argument(
        "--request-rate",
        metavar="R",
        type=float,
        default=float("inf"),
        help="requests/s, at random times (default: inf, all at once or closed loop)",
    )
    group.add_argument(
        "--burstiness",
        metavar="SHAPE",
        type=float,
        help="shape of the gamma distributed gaps (default: 1, Poisson; below 1 burstier)",
    )
    group.add_argument(
        "--ramp-up-strategy",
        choices=("linear", "exponential"),
        help="a rate that changes over the whole run, from --ramp-up-start-rps on",
    )
    group.add_argument("--ramp-up-start-rps", metavar="R", type=float, help="requests/s at first")
    group.add_argument("--ramp-up-end-rps", metavar="R", type=float, help="requests/s at the end")
    group.add_argument(
        "--rate-steps", metavar="R:S,R:S", help="rates one after the other, each for S seconds"
    )
    group.add_argument(
        "--seed",
        metavar="N",
        type=int,
        default=0,
        help="of prompts, lengths and times (default: 0)",
    )


def add_prompts_arguments(parser: argparse.ArgumentParser) -> None:
    """What requests hold."""
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--dataset-name",
        choices=("random", "text", "sharegpt", "mt-bench", "gsm8k", "messages"),
        default="random",
        help="random token ids, the lines of a file, or a chat set (default: random)",
    )
    group.add_argument(
        "--dataset-path",
        metavar="FILE",
        type=Path,
        help='text: a prompt on each line, or .jsonl with "prompt" and maybe "output_len"; '
        "chat sets: JSON or JSON lines of the format named",
    )
    group.add_argument(
        "--random-input-len",
        "--input-len",
        metavar="N",
        type=int,
        help="random: tokens of a prompt (default: 128)",
    )
    group.add_argument(
        "--random-output-len",
        "--output-len",
        metavar="N",
        type=int,
        help="tokens of an answer; for texts the most of them (default: 128)",
    )
    group.add_argument(
        "--random-range-ratio",
        metavar="R",
        type=float,
        help="random: lengths vary by this share to either side, 0 to 1 (default: 0)",
    )
    group.add_argument(
        "--random-prefix-len",
        metavar="N",
        type=int,
        help="random: tokens before each prompt that others share (default: 0)",
    )
    group.add_argument(
        "--random-num-prefixes",
        metavar="N",
        type=int,
        help="random: different prefixes, one at random for each prompt (default: 1)",
    )
    group.add_argument(
        "--vocab-size",
        metavar="N",
        type=int,
        help="random: ids are 0 to N-1 (default: what the server says)",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """What each request asks of the sampler."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        help="generate on past end tokens (default: for random prompts)",
    )
    group.add_argument(
        "--temperature", metavar="T", type=float, help="0 is greedy (default: the server's)"
    )
    group.add_argument("--top-p", metavar="P", type=float, help="0 to 1 (default: the server's)")
    group.add_argument(
        "--continuous-usage",
        action="store_true",
        help="ask for token counts in each chunk: exact itl where chunks hold several tokens",
    )
    group.add_argument(
        "--extra-body", metavar="JSON", help='more fields of each request, as {"top_k": 5}'
    )


def add_figures_arguments(parser: argparse.ArgumentParser) -> None:
    """What is reported, and where it is saved."""
    group = parser.add_argument_group("figures")
    group.add_argument(
        "--percentile-metrics",
        metavar="NAMES",
        help="latencies to report (default: ttft,tpot,itl,e2el; see docs/benchmarks.md)",
    )
    group.add_argument(
        "--metric-percentiles",
        metavar="PERCENTS",
        default="50,90,99",
        help="percentiles to report (default: 50,90,99)",
    )
    group.add_argument(
        "--goodput",
        metavar="NAME:MS",
        nargs="+",
        default=[],
        help="objectives: ttft, tpot, e2el in milliseconds; counts requests that meet all",
    )
    group.add_argument("--save-result", action="store_true", help="save the JSON document")
    group.add_argument(
        "--save-detailed", action="store_true", help="with lists of every request's figures"
    )
    group.add_argument(
        "--result-dir", metavar="DIR", type=Path, help="folder (default: the current one)"
    )
    group.add_argument(
        "--result-filename",
        metavar="NAME",
        help="file (default: LABEL-RATEqps-MODEL-DATE.json)",
    )
    group.add_argument(
        "--html", metavar="FILE", type=Path, help="write a page of figures and plots for people"
    )
    group.add_argument(
        "--markdown", metavar="FILE", type=Path, help="write the figures as Markdown tables"
    )
    group.add_argument("--label", metavar="NAME", help="kept in the result and in its file's name")


def add_objective_arguments(group: argparse._ArgumentGroup) -> None:
    """What requests are to meet, and how many of them."""
    group.add_argument(
        "--slo",
        metavar="NAME:MS,NAME:MS",
        required=True,
        help="objectives of a request: ttft, tpot, e2el in milliseconds",
    )
    group.add_argument(
        "--attainment",
        metavar="SHARE",
        type=float,
        default=0.9,
        help="share of the requests that must meet them (default: 0.9)",
    )


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """What a capacity is and how closely it is found."""
    group = parser.add_argument_group("search")
    add_objective_arguments(group)
    group.add_argument(
        "--start-rate",
        metavar="R",
        type=float,
        default=1.0,
        help="requests/s of the first probe (default: 1)",
    )
    group.add_argument(
        "--probe-seconds",
        metavar="S",
        type=float,
        default=30.0,
        help="seconds in which a probe's requests are due, at least 20 of them (default: 30)",
    )
    group.add_argument(
        "--tolerance",
        metavar="SHARE",
        type=float,
        default=0.1,
        help="how near the rates met and missed must be at the end (default: 0.1)",
    )
    group.add_argument(
        "--num-warmups",
        metavar="N",
        type=int,
        default=0,
        help="requests sent before each probe (default: 0; one is always sent)",
    )
    group.add_argument(
        "--seed",
        metavar="N",
        type=int,
        default=0,
        help="of prompts, lengths and times (default: 0)",
    )
