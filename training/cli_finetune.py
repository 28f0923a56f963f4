"""`llmserve finetune`: tune a model to a task, or go on with an interrupted tuning."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from .cli_recipe import (
    add_recipe_options,
    add_run_options,
    check_installed,
    given_fields,
    report_outcome,
)
from .finetune_recipe import TASKS, FinetuneRecipe, load_finetune_recipe

__all__ = ["add_arguments", "run"]

_DESCRIPTION = """\
Tune a model to a task with labelled rows and write it as a model folder, OUT/model.

{tasks}

Rows are JSON lines (.jsonl), a JSON list or SQuAD's nesting (.json), or a table (.csv, .tsv). A
part of them is held out; figures before and after are of that part. OUT also gets the log, the
loss curve, checkpoints and, with LoRA, OUT/adapter. The same command again goes on from the last
checkpoint, after a crash too. docs/finetuning.md has each task's fields.
"""

_EXAMPLES = """\
examples:
  llmserve finetune instruct run/model --data chats.jsonl --out tuned
  llmserve finetune instruct run/model --data chats.jsonl --out tuned --method lora --rank 16
  llmserve finetune classify run/model --data spam.tsv --columns text=SMS,label=Label --out spam
  llmserve finetune span run/model --data squad.json --out reader
  llmserve finetune dpo tuned/model --data pairs.jsonl --out preferred --method lora
  llmserve finetune distill small/model --teacher large/model --data texts.jsonl --out distilled
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments; every field of `FinetuneRecipe` is an option."""
    width = max(map(len, TASKS))
    tasks = "\n".join(f"  {name:<{width}}  {line}" for name, line in TASKS.items())
    parser.description = _DESCRIPTION.format(tasks=tasks)
    parser.epilog = _EXAMPLES
    parser.add_argument("task", choices=tuple(TASKS), metavar="TASK", help="what is learned")
    parser.add_argument("model", type=Path, metavar="MODEL", help="the model folder to begin with")
    parser.add_argument(
        "--data", nargs="+", required=True, type=Path, metavar="FILE", help="rows to learn from"
    )
    parser.add_argument(
        "--held-out-data",
        nargs="+",
        default=[],
        type=Path,
        metavar="FILE",
        help="rows to evaluate on (default: a share of --data, see --held-out)",
    )
    add_run_options(parser, recipe_help="a TOML file")
    add_recipe_options(parser, FinetuneRecipe, leave_out="task")


def run(args: argparse.Namespace) -> int:
    """Fine-tune."""
    check_installed()
    from .finetune_report import render_finetuning
    from .finetune_run import run_finetuning
    from .progress_report import TerminalReporter

    logging.basicConfig(format="%(levelname)s: %(message)s")
    path = None if args.recipe is None else Path(args.recipe)
    recipe = load_finetune_recipe(path, given_fields(args, FinetuneRecipe))
    with TerminalReporter(is_quiet=args.quiet) as reporter:
        outcome = run_finetuning(
            recipe,
            args.model,
            args.data,
            args.out,
            reporter=reporter,
            held_out_data=args.held_out_data,
            restart=args.restart,
        )
    return report_outcome(args, outcome, render_finetuning)
