"""`llmserve data`: make a training text, or clean one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from .clean_steps import DEFAULT_STEPS, STEPS

__all__ = ["add_arguments", "run"]

_DESCRIPTION = "Make a text to train on, or clean one."

_EXAMPLES = """\
examples:
  llmserve data python-manual --out manual.txt
  llmserve data clean scraped/ --out clean.jsonl
  llmserve train --text clean.jsonl --out run
"""

_MANUAL = """\
The manual of the Python that runs this: the texts behind help() and the docstrings of the standard
library, cleaned into prose without code, tables, markup and repetition. Documents are two empty
lines apart. The same Python gives the same text; its sha256 is printed.
"""

_CLEAN = """\
Clean text and write it as JSON lines, one document in each, with a table of what every step took
away. What is kept is in the order in which it was read; of equal documents the first stays.
"""

_CLEAN_EPILOG = """\
steps, in the order in which they run:
{steps}

`llmserve train --cleaning STEPS` cleans in the same way before it trains; its default is
{default}.
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
    _add_clean(kinds)


def _add_clean(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    width = max(map(len, STEPS))
    steps = "\n".join(f"  {name:<{width}}  {what}" for name, what in STEPS.items())
    clean = kinds.add_parser(
        "clean",
        help="text without debris, duplicates and what is no language",
        description=_CLEAN,
        epilog=_CLEAN_EPILOG.format(steps=steps, default=DEFAULT_STEPS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    clean.add_argument(
        "text",
        nargs="+",
        metavar="SOURCE",
        help="files, folders (their .txt, .md, .jsonl, .parquet), patterns, - for standard input",
    )
    clean.add_argument("--out", required=True, type=Path, metavar="FILE", help=".jsonl to write")
    clean.add_argument(
        "--cleaning",
        default="all",
        metavar="STEPS",
        help="with commas between, all or none (default: all)",
    )
    clean.add_argument(
        "--separator",
        default="",
        metavar="TEXT",
        help="between two documents of one file (default: files are cut at empty lines)",
    )
    clean.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="field of a .jsonl line or column of a .parquet table (default: text)",
    )
    clean.add_argument("--report", type=Path, metavar="FILE", help="write the report as JSON, too")
    clean.add_argument("--json", action="store_true", help="print the report as JSON")
    clean.set_defaults(sub_run=_clean)


def run(args: argparse.Namespace) -> int:
    """Make the text that was asked for."""
    code: int = args.sub_run(args)
    return code


def _write_manual(args: argparse.Namespace) -> int:
    from llmserve.durable import write_bytes

    from .python_manual import build_manual

    corpus = build_manual()
    _write(args.out, lambda path: write_bytes(path, corpus.text.encode()))
    print(
        f"{args.out}: {len(corpus.text):,} characters, {corpus.num_documents:,} documents from "
        f"Python {corpus.python_version}\nsha256 {corpus.sha256}"
    )
    return 0


def _clean(args: argparse.Namespace) -> int:
    import json

    from llmserve.durable import write_chunks, write_json
    from llmserve.errors import ConfigError

    from .clean_report import render_cleaning
    from .corpus import documents_sha256, read_documents

    if args.out.suffix != ".jsonl":
        raise ConfigError(f"--out must end in .jsonl, the form that is written; got {args.out}")
    found = read_documents(
        args.text, separator=args.separator, text_field=args.text_field, cleaning=args.cleaning
    )
    report = found.cleaning.as_json() | {"sha256": documents_sha256(found.texts)}
    lines = (f"{json.dumps({'text': text}, ensure_ascii=False)}\n".encode() for text in found.texts)
    _write(args.out, lambda path: write_chunks(path, lines))
    if args.report is not None:
        _write(args.report, lambda path: write_json(path, report))
    if args.json:
        print(json.dumps(report))
    else:
        print(f"{render_cleaning(found.cleaning)}\n{args.out}: sha256 {report['sha256']}")
    return 0


def _write(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file, and its folder if there is none; a failure is named after the file."""
    from llmserve.errors import DataError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from error
