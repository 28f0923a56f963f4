"""`llmserve bench`: `serve` loads a running server, `throughput` times a model in process, `engine`
the engine without one, `kernels` the operations alone, `quality` tells what quantized forms cost;
`cli_load.py` has what is made of saved load tests, `cli_offline.py` the verbs that compare us with
other engines."""

from __future__ import annotations

import argparse
from pathlib import Path

from llmserve.native.kernels import INSTRUCTION_SETS
from llmserve.runner_arguments import add_runner_arguments, add_verify_argument

from .cli_load import add_load_verbs
from .cli_offline import add_offline_verbs
from .cli_verbs import add_verb

__all__ = ["add_arguments", "run"]

SERVE_DESCRIPTION = """\
Send requests to any OpenAI-compatible server and measure how it answers.

Closed loop: --max-concurrency N with the default rate: N clients, each sending its next request
when its last was answered. Open loop: --request-rate R: requests are due at random times (a
Poisson process) whether or not the server keeps up, and their latency counts from then.

Prints a table and, as the last line, one JSON document with the keys of `vllm bench serve`.
Exits with 0 when every request succeeded, 1 when some failed, 130 when interrupted (what had
ended by then is still printed). The key is read from OPENAI_API_KEY.
"""

SERVE_EXAMPLES = """\
examples:
  llmserve bench serve --max-concurrency 16 --num-prompts 64
  llmserve bench serve --base-url http://127.0.0.1:8080 --request-rate 4 --num-prompts 200 \\
      --random-input-len 256 --random-output-len 64 --goodput ttft:200 tpot:50
  llmserve bench serve --endpoint /v1/chat/completions --dataset-name text \\
      --dataset-path prompts.txt --max-concurrency 4 --save-result --result-dir results
"""

THROUGHPUT_DESCRIPTION = """\
Generate from random prompts in this process, without a server, at several concurrencies, and
print output tokens per second for each, prompts included. Every setting is run once per repeat,
in turn, so that a change of the machine's speed meets all of them; medians are reported.
The last line is one JSON document.
"""

THROUGHPUT_EXAMPLES = """\
examples:
  llmserve bench throughput models/demo-int8 --num-prompts 32 --concurrency 1,4,16
  llmserve bench throughput models/demo --baseline plain --input-len 64 --output-len 64
"""

ENGINE_DESCRIPTION = """\
Measure what the engine costs beside the model: microseconds of a step with 1, 32, 256 and 1,024
decoding sequences, over a runner that answers at once and whose own time is taken off.
The last line is one JSON document.
"""

ENGINE_EXAMPLES = """\
examples:
  llmserve bench engine
  llmserve bench engine --num-seqs 64,512 --steps 1000
"""

KERNELS_DESCRIPTION = """\
Time each operation of the native runner alone, with the sizes of a model: linear layers, attention,
preparing activations, sampling. Beside the time stands a floor under which no kernel gets: the
bytes that it must read over the bandwidth of the memory, or its multiply-adds over the peak of the
instructions it is made of, whichever is longer. Both are measured in the same run.

Only the sizes and forms of the weights are the model's, the numbers are invented. Weights and
cached keys are copies that together exceed the cache, so each is read from memory. Medians; the
last line is one JSON document.
"""

KERNELS_EXAMPLES = """\
examples:
  llmserve bench kernels models/demo-int8
  llmserve bench kernels --shape L --scheme int4 --rows 1,32 --threads 2
"""

QUALITY_DESCRIPTION = """\
Compute a text with a model in float32 and with quantized folders of it, on the native runner, and
print KL divergence and perplexity: of the rounded weights alone, and as executed, with int8
activations. The output layer is as stored and the KV cache float32, so that nothing else differs.
The last line is one JSON document.
"""

QUALITY_EXAMPLES = """\
examples:
  llmserve bench quality run/model run/model-int8 run/model-int4 --text held-out.txt
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sub-verbs and their options."""
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    serve = add_verb(verbs, "serve", "load-test a server", SERVE_DESCRIPTION, SERVE_EXAMPLES)
    _add_server(serve)
    _add_traffic(serve)
    _add_prompts(serve)
    _add_sampling(serve)
    _add_figures(serve)
    serve.set_defaults(sub_run=_run_serve)
    add_load_verbs(verbs)
    throughput = add_verb(
        verbs, "throughput", "time a model offline", THROUGHPUT_DESCRIPTION, THROUGHPUT_EXAMPLES
    )
    _add_throughput(throughput)
    throughput.set_defaults(sub_run=_run_throughput)
    add_offline_verbs(verbs)
    engine = add_verb(
        verbs, "engine", "time the engine without a model", ENGINE_DESCRIPTION, ENGINE_EXAMPLES
    )
    _add_engine(engine)
    engine.set_defaults(sub_run=_run_engine)
    kernels = add_verb(
        verbs, "kernels", "time each operation alone", KERNELS_DESCRIPTION, KERNELS_EXAMPLES
    )
    _add_kernels(kernels)
    kernels.set_defaults(sub_run=_run_kernels)
    quality = add_verb(
        verbs, "quality", "what quantized forms cost", QUALITY_DESCRIPTION, QUALITY_EXAMPLES
    )
    _add_quality(quality)
    quality.set_defaults(sub_run=_run_quality)


def run(args: argparse.Namespace) -> int:
    """Run the sub-verb chosen; the exit code."""
    code: int = args.sub_run(args)
    return code


def _run_serve(args: argparse.Namespace) -> int:
    from .options import options_from
    from .serve import bench_serve

    return bench_serve(options_from(args))


def _run_throughput(args: argparse.Namespace) -> int:
    from .throughput import bench_throughput, throughput_options

    return bench_throughput(throughput_options(args))


def _run_engine(args: argparse.Namespace) -> int:
    from .engine_cost import bench_engine_cost, engine_cost_options

    return bench_engine_cost(engine_cost_options(args))


def _run_kernels(args: argparse.Namespace) -> int:
    from .kernels import bench_kernels, kernels_options

    return bench_kernels(kernels_options(args))


def _run_quality(args: argparse.Namespace) -> int:
    from .quality import bench_quality, quality_options

    return bench_quality(quality_options(args))


def _add_quality(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="the folder, not quantized")
    parser.add_argument(
        "forms", nargs="+", type=Path, metavar="FOLDER", help="quantized folders of it"
    )
    parser.add_argument("--text", required=True, type=Path, metavar="FILE", help="what to compute")
    parser.add_argument(
        "--window", type=int, default=256, metavar="N", help="tokens together (default: 256)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=6144, metavar="N",
        help="most tokens of the text (default: 6144)",
    )  # fmt: skip


def _add_server(parser: argparse.ArgumentParser) -> None:
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


def _add_traffic(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("traffic")
    group.add_argument(
        "--num-prompts", metavar="N", type=int, default=1000, help="requests (default: 1000)"
    )
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
        "--seed",
        metavar="N",
        type=int,
        default=0,
        help="of prompts, lengths and times (default: 0)",
    )


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--dataset-name",
        choices=("random", "text"),
        default="random",
        help="random token ids, or the lines of a file (default: random)",
    )
    group.add_argument(
        "--dataset-path",
        metavar="FILE",
        type=Path,
        help='text: a prompt on each line, or .jsonl with "prompt" and maybe "output_len"',
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
        help="tokens of an answer; for text the most of them (default: 128)",
    )
    group.add_argument(
        "--random-range-ratio",
        metavar="R",
        type=float,
        help="random: lengths vary by this share to either side, 0 to 1 (default: 0)",
    )
    group.add_argument(
        "--vocab-size",
        metavar="N",
        type=int,
        help="random: ids are 0 to N-1 (default: what the server says)",
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
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
        "--extra-body", metavar="JSON", help='more fields of each request, as {"top_k": 5}'
    )


def _add_figures(parser: argparse.ArgumentParser) -> None:
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
    group.add_argument("--label", metavar="NAME", help="kept in the result and in its file's name")


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-seqs",
        metavar="N,N",
        default="1,32,256,1024",
        help="running sequences (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", metavar="N", type=int, default=300, help="steps of one run (default: 300)"
    )
    parser.add_argument(
        "--repeats", metavar="N", type=int, default=3, help="runs of each (default: 3)"
    )


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, nargs="?", help="a model folder")
    parser.add_argument(
        "--shape", choices=("S", "M", "L"), help="instead of MODEL: one of bench make-model's"
    )
    parser.add_argument(
        "--scheme", choices=("int4", "int8", "bf16"), help="form of a shape (default: int4)"
    )
    parser.add_argument(
        "--rows",
        metavar="N,N",
        default="1,8,32,128,512",
        help="rows of linear layers (default: %(default)s)",
    )
    parser.add_argument(
        "--kv-cache-dtype",
        choices=("float32", "bfloat16", "int8"),
        default="bfloat16",
        help="type of keys and values (default: %(default)s)",
    )
    parser.add_argument(
        "--instruction-set",
        choices=INSTRUCTION_SETS,
        default="auto",
        help="which of the processor's to use (default: the best)",
    )
    parser.add_argument(
        "--threads", metavar="N", type=int, help="threads of a step (default: all cores)"
    )
    parser.add_argument(
        "--repeats", metavar="N", type=int, default=5, help="timings of each (default: 5)"
    )


def _add_throughput(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a model folder")
    parser.add_argument(
        "--num-prompts", metavar="N", type=int, default=16, help="prompts of a run (default: 16)"
    )
    parser.add_argument(
        "--concurrency",
        metavar="N,N",
        default="1,4,16",
        help="requests under way at a time, one setting for each number (default: 1,4,16)",
    )
    parser.add_argument(
        "--input-len", metavar="N", type=int, default=128, help="tokens of a prompt (default: 128)"
    )
    parser.add_argument(
        "--output-len",
        metavar="N",
        type=int,
        default=128,
        help="tokens of an answer (default: 128)",
    )
    parser.add_argument(
        "--repeats", metavar="N", type=int, default=3, help="runs of each setting (default: 3)"
    )
    parser.add_argument(
        "--baseline",
        choices=("plain",),
        help="plain: also time one stream of a plain torch loop with a KV cache, no engine",
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of the prompts (default: 0)"
    )
    running = parser.add_argument_group("running")
    add_runner_arguments(running)
    add_verify_argument(running)
