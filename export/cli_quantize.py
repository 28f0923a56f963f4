"""`llmserve quantize`: make a model smaller and say what that cost."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from llmserve.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from rich.progress import TaskID

    from .quant_report import QuantizationReport

__all__ = ["add_arguments", "run"]

_DESCRIPTION = """\
Quantize the linear layers of a model folder, measure what that cost, and write a new folder.

schemes:
  int8      8-bit integers, one scale for each output row (or group); all but lossless
  int4      4-bit integers with one scale for every 32 weights: about a fifth of float32's size
  nf4       bitsandbytes' 4-bit NormalFloat, for programs that use that package
  bnb-int8  bitsandbytes' LLM.int8, likewise

int8 and int4 are written as compressed-tensors, which transformers and others read. Embeddings,
norms and the head stay as they are. Both models then read a text that the model was not trained
on; perplexity, KL divergence, agreement of the likeliest token and the largest logit error are
printed and kept in quantization_report.json. The folder appears complete or not at all.
"""

_EXAMPLES = """\
examples:
  llmserve quantize run/model --scheme int8
  llmserve quantize run/model --scheme int4 --group-size 64 --out small --layers
  llmserve quantize others/model --scheme int4 --text held-out.txt
  llmserve quantize others/model --scheme nf4 --no-measure
"""

_SCHEMES = ("int8", "int4", "nf4", "bnb-int8")
_INT4_GROUP_SIZE = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of the original model")
    parser.add_argument("--scheme", choices=_SCHEMES, required=True, help="see above")
    parser.add_argument(
        "--group-size",
        type=_group_size,
        default="",
        metavar="N|row",
        help="int8, int4: weights that share a scale; a width that it does not divide gets the "
        "nearest divisor that keeps the error (default: row for int8, 32 for int4)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where to write (default: MODEL-SCHEME)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing FOLDER")
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="UTF-8 text to measure on (default: evaluation.txt in MODEL, which training leaves)",
    )
    parser.add_argument(
        "--max-tokens",
        type=_positive,
        default=16_384,
        metavar="N",
        help="most tokens of the text that are measured (default: %(default)s)",
    )
    parser.add_argument("--no-measure", action="store_true", help="quantize without measuring")
    parser.add_argument("--layers", action="store_true", help="print one line for each layer too")


def run(args: argparse.Namespace) -> int:
    """Quantize, print the report, and say where the model is."""
    if args.no_measure and args.text is not None:
        raise ConfigError("--text is what is measured on; leave out --no-measure or --text")
    out = args.out or args.model.absolute().with_name(f"{args.model.absolute().name}-{args.scheme}")
    report = _quantize(args, out)
    from .quant_table import format_report

    print(format_report(report, layers=args.layers))
    print(f"\n{args.scheme} model: {out}")
    return 0


def _quantize(args: argparse.Namespace, out: Path) -> QuantizationReport:
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
            args.model,
            out,
            scheme=args.scheme,
            group_size=_asked_group_size(args),
            measure=not args.no_measure,
            text=args.text,
            max_tokens=args.max_tokens,
            overwrite=args.overwrite,
            on_progress=show,
        )


def _asked_group_size(args: argparse.Namespace) -> int | None:
    if args.group_size == "":
        return _INT4_GROUP_SIZE if args.scheme == "int4" else None
    if args.scheme not in ("int8", "int4"):
        raise ConfigError(f"--group-size is a choice of int8 and int4; {args.scheme} has its own")
    size: int | None = args.group_size
    return size


def _group_size(text: str) -> int | str | None:
    """`row` → None, a positive whole number → itself; "" → "", the scheme's own default."""
    if text in ("", "row"):
        return None if text else ""
    return _positive(text)


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on is needed, got {text!r}")
    return value
