"""`llmserve train compare`: variants of a recipe side by side, at equal compute."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from dataclasses import asdict
from pathlib import Path

from llmserve.errors import ConfigError

from .cli_recipe import add_recipe_options, check_installed, given_fields
from .compare_variants import AXES
from .recipe import TrainingRecipe, load_recipe

__all__ = ["add_arguments", "run"]

_DESCRIPTION = """\
Train a recipe and variants of it on one text, with equal floating-point operations, and print and
plot how low the held-out loss of each gets. Each variant changes one thing of the recipe.

OUT gets a run's folder for each, comparison.json and comparison.html. The same command again goes
on where it was.
"""

_EXAMPLES = """\
examples:
  llmserve train compare --text book.txt --out compared --steps 500
  llmserve train compare --text book.txt --out compared --steps 500 --vary positions heads --seeds 3
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments; every field of `TrainingRecipe` is an option of the base."""
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "--text", nargs="+", required=True, metavar="SOURCE", help="as for `llmserve train`"
    )
    parser.add_argument("--out", required=True, type=Path, help="the comparison's folder")
    parser.add_argument(
        "--vary",
        nargs="+",
        default=["positions", "norm", "activation", "heads", "experts"],
        choices=list(AXES),
        help="what to vary, one at a time (default: positions norm activation heads experts)",
    )
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="runs of each variant (default: 1)"
    )
    parser.add_argument("--recipe", metavar="FILE", help="a TOML file, or the name of a recipe")
    parser.add_argument("--quiet", action="store_true", help="print the table alone")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    add_recipe_options(parser, TrainingRecipe)


def run(args: argparse.Namespace) -> int:
    """Compare."""
    check_installed()
    from .compare_report import render_comparison
    from .compare_run import compare
    from .progress_report import TerminalReporter

    logging.basicConfig(format="%(levelname)s: %(message)s")
    if args.seeds < 1:
        raise ConfigError(f"--seeds must be 1 or more, got {args.seeds}")
    recipe = load_recipe(args.recipe, given_fields(args, TrainingRecipe))
    with TerminalReporter(is_quiet=args.quiet) as reporter:
        figures = compare(
            recipe, args.vary, args.text, args.out, seeds=args.seeds, reporter=reporter
        )
    if isinstance(figures, int):
        print(f"stopped; the same command goes on ({args.out})", file=sys.stderr)
        if figures == signal.SIGINT:
            raise KeyboardInterrupt
        return 0
    if args.json:
        print(json.dumps([asdict(one) for one in figures]))
    else:
        print(render_comparison(figures))
        print(f"\n{args.out / 'comparison.html'} shows the curves")
    return 0
