"""`llmserve bench offline` and `bench make-model`: our engine beside others, on models to time."""

from __future__ import annotations

import argparse
from pathlib import Path

from .cli_verbs import Verbs, add_verb

__all__ = ["add_offline_arguments", "add_offline_verbs"]

OFFLINE_DESCRIPTION = """\
Time llmserve and other engines on one model, in turn, in one run: the prefill of one prompt, and
the decoding of several sequences together after prompts of their own. Peers take part where an
option names them; each runs in a process of its own, with the context lengths of the others.

The model's other forms are looked for beside it. For M: M-int4 and M-int8 (`llmserve quantize`),
M-q4_0.gguf, M-q8_0.gguf and M-bf16.gguf (`llmserve export gguf`), M-onnx-fp32, -int8 and -int4
(`llmserve export onnx`: the same graph on our ONNX runner and on onnxruntime-genai),
M-openvino-int4 and -int8, and M-onnxruntime-genai-int4 and -int8 (the peers' own tools).
transformers runs M itself in bfloat16.

Prints medians, ranges and how many times the fastest peer ours is, and as the last line one JSON
document.
"""

OFFLINE_EXAMPLES = """\
examples:
  llmserve bench make-model --shape M --out models/M
  llmserve quantize models/M --scheme int4 --no-measure
  llmserve export gguf models/M --type q4_0
  llmserve bench offline models/M --schemes int4 --llama-cpp llama.cpp/build/bin \\
      --transformers venv/bin/python
"""

MAKE_MODEL_DESCRIPTION = """\
Write a Llama model with random weights in bfloat16, to measure speed with. Shapes: S 15M parameters
(stories15M), M 135M (SmolLM2-135M), L 1.2B (Llama-3.2-1B), for GPUs XL 8B (Llama-3.1-8B). The
context is 2048 tokens; the tokenizer is trained on invented words. The same seed gives the same
files.
"""

MAKE_MODEL_EXAMPLES = """\
examples:
  llmserve bench make-model --shape M --out models/M
"""


def add_offline_verbs(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Declare both verbs and their options."""
    offline = add_verb(
        verbs, "offline", "compare with other engines", OFFLINE_DESCRIPTION, OFFLINE_EXAMPLES
    )
    add_offline_arguments(offline)
    offline.set_defaults(sub_run=_run_offline)
    make = add_verb(
        verbs, "make-model", "random weights", MAKE_MODEL_DESCRIPTION, MAKE_MODEL_EXAMPLES
    )
    _add_make_model(make)
    make.set_defaults(sub_run=_run_make_model)


def _run_offline(args: argparse.Namespace) -> int:
    from .offline_contenders import offline_options
    from .offline_peers import bench_offline

    return bench_offline(offline_options(args))


def _run_make_model(args: argparse.Namespace) -> int:
    from .shapes import SHAPES, make_model

    make_model(SHAPES[args.shape], args.out, seed=args.seed, overwrite=args.overwrite)
    print(f"model of shape {args.shape} with random weights: {args.out}")
    return 0


def add_offline_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, its schemes, what is measured in process, and where the peers are."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="the model folder, not quantized")
    parser.add_argument(
        "--schemes",
        metavar="NAME,NAME",
        default="int4,int8",
        help="forms of the weights: int4, int8, bf16, onnx-fp32, onnx-int8, onnx-int4 "
        "(default: %(default)s)",
    )
    parser.add_argument("--runner", metavar="NAME", default="auto", help="ours (default: auto)")
    parser.add_argument(
        "--threads",
        metavar="N",
        type=int,
        help="of every engine (default: our own choice for ours, one for each core for peers)",
    )
    parser.add_argument(
        "--sequences",
        metavar="N,N",
        default="1,8,32",
        help="sequences decoded together, one measurement for each number (default: 1,8,32)",
    )
    parser.add_argument(
        "--prefill-len",
        metavar="N",
        type=int,
        default=512,
        help="tokens of the prompt whose prefill is timed (default: 512)",
    )
    parser.add_argument(
        "--input-len",
        metavar="N",
        type=int,
        default=128,
        help="tokens of a prompt before decoding (default: 128)",
    )
    parser.add_argument(
        "--output-len",
        metavar="N",
        type=int,
        default=64,
        help="tokens of each sequence that are timed (default: 64)",
    )
    parser.add_argument(
        "--repeats", metavar="N", type=int, default=3, help="rounds after the first (default: 3)"
    )
    parser.add_argument(
        "--busy",
        metavar="N,N",
        help="decode these numbers of sequences once more while another process keeps a core busy",
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of the prompts (default: 0)"
    )
    _add_peers(parser)


def _add_peers(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("peers")
    group.add_argument("--llama-cpp", metavar="DIR", type=Path, help="folder of its programs")
    for name in ("transformers", "openvino", "onnxruntime-genai"):
        group.add_argument(
            f"--{name}", metavar="PYTHON", type=Path, help=f"a Python that has {name}"
        )


def _add_make_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=("S", "M", "L", "XL"), required=True, help="see above")
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, required=True, help="where to write the model"
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of the weights (default: 0)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing FOLDER")
