"""`llmserve eval`: score a model on texts and tasks."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .cli_recipe import check_installed

__all__ = ["add_arguments", "run"]

_DESCRIPTION = """\
Score a model: loss, perplexity and bits per byte on texts; on tasks accuracy, macro F1, exact match
and token F1, whichever fit. Every figure comes with a 95 % interval, from resampling documents or
rows.

A task file is TOML, or JSON lines of prompts and answers; docs/evaluation.md has its settings.
"""

_EXAMPLES = """\
examples:
  llmserve eval run/model --text test.txt
  llmserve eval run/model --text test.txt --stride 128
  llmserve eval run/model --task capitals.jsonl arithmetic.toml --json
  llmserve eval spam/model --task spam.toml --out scores.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    parser.add_argument("model", type=Path, metavar="MODEL", help="the model folder")
    parser.add_argument(
        "--text",
        nargs="+",
        default=[],
        type=Path,
        metavar="FILE",
        help='texts to predict; a .jsonl file holds one {"text": ...} a line, any other is one '
        "document",
    )
    parser.add_argument(
        "--task", nargs="+", default=[], type=Path, metavar="FILE", help="task files"
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens of a window in texts (default: the model's context)",
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="tokens that count in each window; "
        "fewer than the context: windows overlap (default: all)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="first rows of each task alone")
    parser.add_argument("--seed", type=int, default=0, help="seed of the intervals (default: 0)")
    parser.add_argument(
        "--runner", default="auto", help="what computes choices and answers (default: auto)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON there")


def run(args: argparse.Namespace) -> int:
    """Evaluate."""
    check_installed()
    from llmserve.durable import write_json
    from llmserve.errors import ConfigError

    from .eval_run import Evaluation
    from .eval_task_file import read_task

    if not args.text and not args.task:
        raise ConfigError("nothing to evaluate on; give --text or --task")
    tasks = [read_task(path, limit=args.limit) for path in args.task]
    with Evaluation(
        args.model, runner=args.runner, context=args.context, stride=args.stride, seed=args.seed
    ) as evaluation:
        results = [evaluation.run_texts(path.name, _documents(path)) for path in args.text]
        results += [evaluation.run(task) for task in tasks]
    document = {
        "model": str(args.model),
        "fingerprint": evaluation.checkpoint.fingerprint,
        "results": results,
    }
    if args.out is not None:
        write_json(args.out, document)
    print(json.dumps(document) if args.json else _table(results))
    return 0


def _documents(path: Path) -> list[str]:
    from llmserve.errors import DataError

    from .finetune_rows import read_rows

    if path.suffix == ".jsonl":
        return [row.text("text") for row in read_rows([path])]
    try:
        return [path.read_text(encoding="utf-8")]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8: {error}") from error


def _table(results: list[dict[str, Any]]) -> str:
    lines = [("task", "figure", "value", "95 % interval")]
    for result in results:
        head = f"{result['task']} ({result['rows']})"
        for name, figure in result["figures"].items():
            interval = f"{figure['low']:.4f} .. {figure['high']:.4f}"
            lines.append((head, name, f"{figure['value']:.4f}", interval))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
