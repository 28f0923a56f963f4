"""`llmserve data`: make a training text."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_arguments", "run"]

_DESCRIPTION = "Make a text to train on."

_EXAMPLES = """\
examples:
  llmserve data python-manual --out manual.txt
  llmserve train --recipe python-manual --text manual.txt --out run
"""

_MANUAL = """\
The manual of the Python that runs this: the texts behind help() and the docstrings of the standard
library, cleaned into prose without code, tables, markup and repetition. Documents are two empty
lines apart. The same Python gives the same text; its sha256 is printed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    manual = kinds.add_parser(
        "python-manual",
        help="the interpreter's own manual, as prose",
        description=_MANUAL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    manual.add_argument("--out", required=True, type=Path, metavar="FILE", help="text to write")
    manual.set_defaults(sub_run=_write_manual)


def run(args: argparse.Namespace) -> int:
    """Make the text that was asked for."""
    code: int = args.sub_run(args)
    return code


def _write_manual(args: argparse.Namespace) -> int:
    from llmserve.durable import write_bytes
    from llmserve.errors import DataError

    from .python_manual import build_manual

    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        corpus = build_manual()
        write_bytes(args.out, corpus.text.encode())
    except OSError as error:
        raise DataError(f"{args.out}: cannot be written: {error.strerror}") from error
    print(
        f"{args.out}: {len(corpus.text):,} characters, {corpus.num_documents:,} documents from "
        f"Python {corpus.python_version}\nsha256 {corpus.sha256}"
    )
    return 0
