"""`llmserve bench train`: its options."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from .cli_verbs import Verbs, add_verb

__all__ = ["add_train_verb"]

DESCRIPTION = """\
Time `llmserve train` beside a plain torch loop and, where an interpreter that has transformers and
accelerate is named, transformers.Trainer: the same shape, tokens and precision, each run in a
process of its own, in turn. The first 10 steps are not timed. Prints tokens/s and the largest
resident memory, and as the last line one JSON document.
"""

EXAMPLES = """\
examples:
  llmserve bench train --text input.txt --transformers venv/bin/python
"""

_SIZES = {
    "hidden-size": 256,
    "num-layers": 4,
    "num-heads": 4,
    "num-kv-heads": 4,
    "intermediate-size": 688,
    "max-seq-len": 256,
    "batch-size": 4,
    "steps": 60,
    "repeats": 3,
}


def add_train_verb(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Declare the verb and its options."""
    parser = add_verb(verbs, "train", "time training beside other loops", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "--text", required=True, type=Path, metavar="FILE", help="what to train on, by characters"
    )
    parser.add_argument(
        "--transformers", type=Path, metavar="PYTHON", help="an interpreter that has transformers"
    )
    parser.add_argument(
        "--precision",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="type of the matrix products (default: bfloat16)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="threads of every contender (default: one for each core)",
    )
    for name, default in _SIZES.items():
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"(default: {default})"
        )
    parser.set_defaults(sub_run=_run)


def _run(args: argparse.Namespace) -> int:
    from .train_speed import bench_train

    return bench_train(args)
