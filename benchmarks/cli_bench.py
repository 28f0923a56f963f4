"""`llmserve bench`: `throughput` times a model in process, `engine` the engine without one,
`kernels` the operations alone, `quality` tells what quantized forms cost; `cli_load.py` has the
verbs that load a server, `cli_cost.py` latency and start, `cli_offline.py` and
`cli_train_speed.py` those that compare us with others."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from types import FrameType

from llmserve.native.kernels import INSTRUCTION_SETS
from llmserve.runner_arguments import add_runner_arguments, add_verify_argument

from .cli_cost import add_cost_verbs
from .cli_load import add_load_verbs
from .cli_offline import add_offline_verbs
from .cli_peers import add_peers_verb, add_replay_verb
from .cli_train_speed import add_train_verb
from .cli_verbs import add_verb

__all__ = ["add_arguments", "run"]

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
Compute a text with a model in float32 and with other forms of it, and print for each its size, KL
divergence and perplexity: of the rounded weights alone, and as executed, with integer activations.
The output layer is as stored and the KV cache float32, so that nothing else differs. Then each form
decodes 1 and 8 sequences as it would be served, in turn. Quantized folders run on the native
runner, folders with a graph (`llmserve export onnx`) on ONNX Runtime.

--out keeps the JSON document, the table in Markdown and one plot of size, cost and speed as SVG.
The last line is one JSON document.
"""

QUALITY_EXAMPLES = """\
examples:
  llmserve bench quality run/model run/model-int8 run/model-int4 --text held-out.txt
  llmserve bench quality run/model run/model-int8 run/model-onnx --text held-out.txt --out results
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sub-verbs and their options."""
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    add_load_verbs(verbs)
    throughput = add_verb(
        verbs, "throughput", "time a model offline", THROUGHPUT_DESCRIPTION, THROUGHPUT_EXAMPLES
    )
    _add_throughput(throughput)
    throughput.set_defaults(sub_run=_run_throughput)
    add_cost_verbs(verbs)
    add_offline_verbs(verbs)
    add_peers_verb(verbs)
    add_replay_verb(verbs)
    add_train_verb(verbs)
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
    """Run the sub-verb chosen; the exit code.

    SIGTERM ends it as Ctrl-C does: what had been measured is told, servers that it started end too.
    """
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        code: int = args.sub_run(args)
    finally:
        signal.signal(signal.SIGTERM, before)
    return code


def _interrupt(number: int, frame: FrameType | None) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


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
        "forms", nargs="+", type=Path, metavar="FOLDER", help="quantized or with a graph"
    )
    parser.add_argument("--text", required=True, type=Path, metavar="FILE", help="what to compute")
    parser.add_argument(
        "--window", type=int, default=256, metavar="N", help="tokens together (default: 256)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=6144, metavar="N",
        help="most tokens of the text (default: 6144)",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N",
        help="rounds in which the forms decode; 0: no speed (default: 3)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="keep document, table and plot, as quality-MODEL.*"
    )


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
