"""`llmserve merge`: a model and its adapter become one model."""

from __future__ import annotations

import argparse
from pathlib import Path

from .cli_recipe import check_installed

__all__ = ["add_arguments", "run"]

_DESCRIPTION = """\
Add a LoRA adapter to the weights that it adapts and write the result as a model folder.

The merged model computes what model and adapter did together, and opens where adapters are not
known. Quantized layers of the model are turned to floats.
"""

_EXAMPLES = """\
examples:
  llmserve merge run/model tuned/adapter --out merged
  llmserve merge run/model peft-folder --out merged --dtype bfloat16
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    parser.add_argument("model", type=Path, metavar="MODEL", help="the model folder")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="the adapter's folder")
    parser.add_argument("--out", required=True, type=Path, help="the folder to write")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the merged weights (default: the model's)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")


def run(args: argparse.Namespace) -> int:
    """Merge."""
    check_installed()
    from .lora_merge import merge_adapter

    merge_adapter(args.model, args.adapter, args.out, dtype=args.dtype, overwrite=args.overwrite)
    print(args.out)
    return 0
