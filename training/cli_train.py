"""`llmserve train`: train a model from text, or go on with an interrupted training."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from .cli_recipe import (
    add_recipe_options,
    add_run_options,
    check_installed,
    given_fields,
    report_outcome,
)
from .recipe import TrainingRecipe, load_recipe, recipe_names

__all__ = ["add_arguments", "run"]

_DESCRIPTION = """\
Train a language model on text and write it as a model folder, OUT/model.

The text is cleaned, a part of it held out for evaluation, a tokenizer trained on the rest. OUT
also gets the log, the loss curve (loss.png) and checkpoints: the same command again goes on from
the last one, after a crash too. Text must be UTF-8; a .jsonl file holds one {"text": ...} a line, a
.parquet table one in each row of the column "text" (--text-field names another).
"""

_EXAMPLES = """\
examples:
  llmserve train --text book.txt --out run --minutes 5
  llmserve train --text docs/ 'notes/*.md' --out run --steps 2000 --hidden-size 384 --num-layers 6
  llmserve train --recipe tinyshakespeare --text input.txt --out run
  llmserve train --out run                     go on with the run in that folder
  torchrun --nproc-per-node 2 -m llmserve train --text book.txt --out run --steps 2000
  llmserve train --text docs/ --out run --steps 20000 --device cuda --compile

A recipe is a TOML file with the names of the options below (with _ for -). Recipes that come with
the program: {recipes}.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments; every field of `TrainingRecipe` is an option."""
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES.format(recipes=", ".join(recipe_names()))
    parser.add_argument(
        "--text",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help="files, folders (their .txt, .md, .jsonl, .parquet), patterns, - for standard input",
    )
    add_run_options(parser, recipe_help="a TOML file, or the name of a recipe")
    add_recipe_options(parser, TrainingRecipe)


def run(args: argparse.Namespace) -> int:
    """Train."""
    check_installed()
    from .distributed import join_processes
    from .progress_report import TerminalReporter
    from .report import render_result
    from .training_run import run_training

    logging.basicConfig(format="%(levelname)s: %(message)s")
    recipe = _recipe(args, given_fields(args, TrainingRecipe))
    with (
        join_processes(recipe.device) as processes,
        TerminalReporter(is_quiet=args.quiet or not processes.is_first) as reporter,
    ):
        outcome = run_training(
            recipe,
            args.text,
            args.out,
            reporter=reporter,
            restart=args.restart,
            processes=processes,
        )
    status = report_outcome(args, outcome, render_result) if processes.is_first else 0
    return processes.leave(status)


def _recipe(args: argparse.Namespace, overrides: dict[str, Any]) -> TrainingRecipe:
    """The recipe of the arguments; with none at all, that of the run in the folder."""
    if args.recipe is None and not overrides and not args.restart:
        from .run_folder import RunFolder

        begun = RunFolder(args.out).read_run()
        if begun is not None:
            return load_recipe(None, begun["recipe"])
    return load_recipe(args.recipe, overrides)
