"""`llmserve quantize`: make a model smaller and say what that cost."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from llmserve.errors import MissingDependencyError

from .quant_arguments import add_quantize_arguments, options_of

if TYPE_CHECKING:
    from pathlib import Path

    from rich.progress import TaskID

    from .quant_options import QuantizationOptions
    from .quant_report import QuantizationReport

__all__ = ["add_arguments", "run"]

_DESCRIPTION = """\
Quantize the linear layers of a model folder, measure what that cost, and write a new folder.

schemes:
  int8      8-bit integers, one scale for each output row (or group); all but lossless
  w8a8      the same, and the folder asks for int8 activations; what vLLM runs int8 weights with
  int4      4-bit integers with one scale for every 32 weights: about a fifth of float32's size
  nf4, fp4  bitsandbytes' 4-bit code books, for programs that use that package
  bnb-int8  bitsandbytes' LLM.int8, likewise

methods, for int8, w8a8 and int4; all but rtn read a calibration text, block by block:
  rtn          round to nearest
  mse          search each group's scale for the least error, inputs weighted by their size
  gptq         make each input's error good by those that follow (activation order, static groups)
  awq          scale inputs so that large ones get more of the grid
  smoothquant  w8a8: hand the activations' outliers to the weights
  best         gptq or mse for each layer, whichever errs less in the layer's output

int8, w8a8 and int4 are written as compressed-tensors, which transformers and others read.
Embeddings, norms and the head stay as they are. Both models then read a text that the model was not
trained on; perplexity, KL divergence, agreement of the likeliest token and the largest logit error
are printed and kept in quantization_report.json. The folder appears complete or not at all; an
interrupted calibrated quantization goes on with the block where it was.

With --max-perplexity-increase, --max-kl or --max-size the bits, group size and method of each layer
are searched: a Pareto front is printed, and the model that keeps the bounds is written, the best
within a size or else the smallest. If none keeps them, the exit code is 1 and nothing is written.
"""

_EXAMPLES = """\
examples:
  llmserve quantize run/model --scheme int8
  llmserve quantize run/model --scheme int4 --group-size 64 --method gptq --out small --layers
  llmserve quantize run/model --scheme int4 --asymmetric --layer down_proj=int8:row
  llmserve quantize run/model --max-perplexity-increase 1% --max-size 40MB
  llmserve quantize others/model --scheme w8a8 --method smoothquant --calibration text.txt \\
      --text held-out.txt --kv-cache int8
  llmserve quantize others/model --scheme nf4 --double-quant --no-measure
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    add_quantize_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Quantize, print the report, and say where the model is."""
    options = options_of(args)
    kind = args.scheme if options.contract is None else "searched"
    out = args.out or args.model.absolute().with_name(f"{args.model.absolute().name}-{kind}")
    report = _quantize(args, options, out)
    from .quant_table import format_report

    print(format_report(report, layers=args.layers))
    print(f"\n{kind} model: {out}")
    return 0


def _quantize(
    args: argparse.Namespace, options: QuantizationOptions, out: Path
) -> QuantizationReport:
    from llmserve.console import progress

    try:
        from .quantize_folder import quantize_folder
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            str(error.name), extra="torch", feature="quantizing a model"
        ) from error
    with progress() as display:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = display.add_task(stage, note="")
            display.update(tasks[stage], completed=done, total=total)

        return quantize_folder(
            args.model, out, options, overwrite=args.overwrite, on_progress=show, on_line=print
        )
