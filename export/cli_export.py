"""`llmserve export`: convert a model for other programs. One sub-verb a format."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmserve.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from .export_onnx import OnnxExport

__all__ = ["add_arguments", "run"]

_ONNX_DESCRIPTION = """\
Write a model folder as one ONNX graph: the decoder with its KV cache, for prefill and decoding.

inputs   input_ids, position_ids [batch, sequence]; attention_mask [batch, total], 0 for padding on
         the right; past_key_values.N.key and .value [batch, kv_heads, past, head_dim]
outputs  logits [batch, sequence, vocabulary]; present.N.key and .value, the pasts of the next call
         (a model with a head: its scores, and no cache)

schemes  fp32  everything is float32
         int8  weights with a scale for each output, activations rounded row by row
         int4  weights with a scale for every 32 inputs, activations likewise
A quantized model keeps its own integers. With integers the output layer is int8.

The graph uses operators of ONNX Runtime (1.23 or newer) beside the standard ones; genai_config.json
lets onnxruntime-genai run it, `llmserve serve FOLDER --runner onnx` serves it. Before the folder
appears, the graph continues twelve prompts by 64 tokens on ONNX Runtime, one alone and batches of 3
and 8 of different lengths, and every step is compared with torch: beyond 1e-4 of a logit in
float32, or 0.05 nats of mean divergence beside rounded activations, nothing is written.
"""

_ONNX_EXAMPLES = """\
examples:
  llmserve export onnx run/model
  llmserve export onnx run/model --scheme int8 --out run/onnx --overwrite
"""


_GGUF_DESCRIPTION = """\
Write a Llama-shaped model folder as one GGUF file, for llama.cpp and the programs built on it.

types:
  f32, f16, bf16  every matrix in that type
  q8_0            8-bit integers, 32 weights to a scale
  q4_0            4-bit integers, 32 weights to a scale; embedding and head are q8_0

Norms and biases stay f32. A matrix whose width 32 does not divide is f16 instead of q8_0 or q4_0,
and named. A quantized model is written dequantized, so in f32, f16 or bf16. Models of another
shape, and tokenizers that llama.cpp has no equal of, are refused with the reason.

The file is read back and compared with the model before it appears; its certificate lies beside it
(X.certificate.json and X.reference.logits), and `llmserve verify X.gguf` checks it again.
"""

_GGUF_EXAMPLES = """\
examples:
  llmserve export gguf run/model --type q8_0
  llmserve export gguf run/model --out model.gguf --overwrite
"""

_DEQUANTIZE_DESCRIPTION = """\
Write a quantized model folder (compressed-tensors, GPTQ, AWQ or bitsandbytes) as a plain one, which
every program opens. What quantizing lost stays lost.
"""

_DEQUANTIZE_EXAMPLES = """\
examples:
  llmserve export dequantize run/model-int4
  llmserve export dequantize others/model-awq --dtype bfloat16 --out plain
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's formats and their arguments."""
    formats = parser.add_subparsers(title="formats", metavar="FORMAT", required=True)
    _add_onnx(formats)
    _add_gguf(formats)
    _add_dequantize(formats)


def _add_onnx(formats: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    onnx = formats.add_parser(
        "onnx",
        help="one ONNX graph with its KV cache, checked against torch",
        description=_ONNX_DESCRIPTION,
        epilog=_ONNX_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    onnx.add_argument("model", type=Path, metavar="MODEL", help="model folder")
    onnx.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where to write (default: MODEL-onnx)"
    )
    onnx.add_argument(
        "--scheme",
        choices=("fp32", "int8", "int4"),
        help="numbers of the linear layers (default: those of the folder)",
    )
    onnx.add_argument("--overwrite", action="store_true", help="replace an existing FOLDER")
    onnx.set_defaults(sub_run=_run_onnx)


def _add_gguf(formats: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    gguf = formats.add_parser(
        "gguf",
        help="one GGUF file for llama.cpp",
        description=_GGUF_DESCRIPTION,
        epilog=_GGUF_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    gguf.add_argument("model", type=Path, metavar="MODEL", help="model folder")
    gguf.add_argument(
        "--type",
        choices=("f32", "f16", "bf16", "q8_0", "q4_0"),
        help="of the matrices (default: that of the folder's weights)",
    )
    gguf.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write (default: MODEL-TYPE.gguf)"
    )
    gguf.add_argument("--overwrite", action="store_true", help="replace an existing FILE")
    gguf.set_defaults(sub_run=_run_gguf)


def _add_dequantize(formats: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plain = formats.add_parser(
        "dequantize",
        help="a quantized folder as a plain one",
        description=_DEQUANTIZE_DESCRIPTION,
        epilog=_DEQUANTIZE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plain.add_argument("model", type=Path, metavar="MODEL", help="quantized model folder")
    plain.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of all weights (default: the type that the folder's config.json names)",
    )
    plain.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where to write (default: MODEL-plain)"
    )
    plain.add_argument("--overwrite", action="store_true", help="replace an existing FOLDER")
    plain.set_defaults(sub_run=_run_dequantize)


def run(args: argparse.Namespace) -> int:
    """Run the chosen format's export."""
    code: int = args.sub_run(args)
    return code


def _run_onnx(args: argparse.Namespace) -> int:
    from llmserve.console import console

    try:
        from .export_onnx import export_onnx
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            str(error.name), extra="torch,onnx", feature="exporting to ONNX"
        ) from error
    out = args.out or args.model.absolute().with_name(f"{args.model.absolute().name}-onnx")
    if out.suffix == ".onnx":
        raise ConfigError(f"--out names a folder, which will hold model.onnx; {out} names a file")
    with console().status("opening the model") as status:
        result = export_onnx(
            args.model,
            out,
            scheme=args.scheme,
            overwrite=args.overwrite,
            on_stage=lambda stage: status.update(stage),
        )
    if result.float_layers:
        print(
            f"float32, as the graph has no product for their form: {_listed(result.float_layers)}"
        )
    print(_compared(result))
    print(f"ONNX graph: {out} ({result.form}, {result.num_bytes / 1e6:.2f} MB)")
    return 0


def _listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def _compared(result: OnnxExport) -> str:
    parity = result.parity
    if parity is None:
        return f"checked against torch: largest error of a score {result.head_error:.2e}"
    return (
        f"checked against torch: {parity.num_prompts} prompts, {parity.num_steps} tokens each, "
        f"largest logit error {parity.max_logit_error:.2e}, mean divergence {parity.mean_kl:.2e} "
        f"nats, same likeliest token at {100 * parity.top1_agreement:.2f} %"
    )


def _run_gguf(args: argparse.Namespace) -> int:
    from llmserve.console import console

    try:
        from .gguf import export_gguf
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            str(error.name), extra="torch", feature="exporting to GGUF"
        ) from error
    with console().status("opening the model") as status:
        result = export_gguf(
            args.model, args.out, kind=args.type, overwrite=args.overwrite,
            on_stage=lambda stage: status.update(stage),
        )  # fmt: skip
    if result.dequantized_from is not None:
        print(f"the model's {result.dequantized_from} weights are {result.kind} in the file")
    if result.plain:
        print(f"f16, as 32 does not divide their width: {', '.join(result.plain)}")
    print(f"GGUF file: {result.path} ({result.num_bytes / 1e6:.2f} MB)")
    return 0


def _run_dequantize(args: argparse.Namespace) -> int:
    from .dequantize import dequantize_folder

    out = args.out or args.model.absolute().with_name(f"{args.model.absolute().name}-plain")
    result = dequantize_folder(args.model, out, dtype=args.dtype, overwrite=args.overwrite)
    print(f"the model's {result.form} weights are {result.dtype}")
    print(f"plain model: {result.path} ({result.num_bytes / 1e6:.2f} MB)")
    return 0
