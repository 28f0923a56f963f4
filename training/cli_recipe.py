"""What the commands have in common that make a run from a recipe: options, and how a run ends."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from llmserve.errors import MissingDependencyError

from .recipe_fields import field_docs

if TYPE_CHECKING:
    from .run_loop import RunOutcome

__all__ = [
    "add_recipe_options",
    "add_run_options",
    "check_installed",
    "given_fields",
    "report_outcome",
]


def add_run_options(parser: argparse.ArgumentParser, *, recipe_help: str) -> None:
    """Declare where a run lies, what it begins from and what it prints."""
    parser.add_argument("--out", required=True, type=Path, help="the run's folder")
    parser.add_argument("--recipe", metavar="FILE", help=recipe_help)
    parser.add_argument(
        "--restart", action="store_true", help="remove an earlier run in OUT and begin anew"
    )
    parser.add_argument("--quiet", action="store_true", help="print the final figures alone")
    parser.add_argument("--json", action="store_true", help="print the final figures as JSON")


def given_fields(args: argparse.Namespace, recipe: type) -> dict[str, Any]:
    """The fields of a class of recipes that were given as options."""
    names = [field.name for field in fields(recipe)]
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def report_outcome(
    args: argparse.Namespace,
    outcome: RunOutcome,
    render: Callable[[dict[str, Any], Path], str],
) -> int:
    """Print a run's figures, or that it was stopped; the exit code.

    Raises:
        KeyboardInterrupt: it was stopped by Ctrl-C.
    """
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
        print(render(outcome.result, outcome.model))
    return 0


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
