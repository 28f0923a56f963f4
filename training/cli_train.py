"""`llmserve train`: train a model from text, or go on with an interrupted training."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from llmserve.errors import MissingDependencyError

from .recipe import TrainingRecipe, field_docs, load_recipe, recipe_names

__all__ = ["add_arguments", "add_recipe_options", "check_installed", "run"]

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
    parser.add_argument("--out", required=True, type=Path, help="the run's folder")
    parser.add_argument("--recipe", metavar="FILE", help="a TOML file, or the name of a recipe")
    parser.add_argument(
        "--restart", action="store_true", help="remove an earlier run in OUT and begin anew"
    )
    parser.add_argument("--quiet", action="store_true", help="print the final figures alone")
    parser.add_argument("--json", action="store_true", help="print the final figures as JSON")
    add_recipe_options(parser, TrainingRecipe)


def run(args: argparse.Namespace) -> int:
    """Train."""
    check_installed()
    from .distributed import join_processes
    from .progress_report import TerminalReporter
    from .report import render_result
    from .training_run import run_training

    logging.basicConfig(format="%(levelname)s: %(message)s")
    names = [field.name for field in fields(TrainingRecipe)]
    overrides = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    recipe = _recipe(args, overrides)
    with (
        join_processes() as processes,
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
    if not processes.is_first:
        return 0
    if outcome.result is None:
        print(
            f"stopped at a checkpoint; the same command goes on from it ({args.out})",
            file=sys.stderr,
        )
        if outcome.stopped_by == signal.SIGINT:
            raise KeyboardInterrupt
        return 0
    if args.json:
        print(json.dumps({**outcome.result, "model": str(outcome.model)}))
    else:
        print(render_result(outcome.result, outcome.model))
    return 0


def _recipe(args: argparse.Namespace, overrides: dict[str, Any]) -> TrainingRecipe:
    """The recipe of the arguments; with none at all, that of the run in the folder."""
    if args.recipe is None and not overrides and not args.restart:
        from .run_folder import RunFolder

        begun = RunFolder(args.out).read_run()
        if begun is not None:
            return load_recipe(None, begun["recipe"])
    return load_recipe(args.recipe, overrides)


def check_installed() -> None:
    """Raise `MissingDependencyError` unless torch is installed."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("torch", extra="train", feature="training") from error


def add_recipe_options(
    parser: argparse.ArgumentParser, recipe: type, *, leave_out: str = ""
) -> None:
    """Make every field of a class of recipes an option, but the one that is left out."""
    group = parser.add_argument_group("recipe", "each replaces what the recipe says")
    hints, docs = get_type_hints(recipe), field_docs(recipe)
    for field in fields(recipe):
        if field.name == leave_out:
            continue
        hint, default = hints[field.name], field.default
        choices = get_args(hint) if isinstance(default, str) and get_args(hint) else None
        kind = next((k for k in (get_args(hint) or (hint,)) if k in (int, float, bool)), str)
        shown = "none" if default in (None, "") else default
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            dest=field.name,
            type=kind,
            choices=choices,
            action=argparse.BooleanOptionalAction if kind is bool else "store",
            metavar=None if choices or kind is bool else {int: "N", float: "X", str: "TEXT"}[kind],
            help=f"{docs[field.name].replace('%', '%%')} (default: {shown})",
        )
