"""`llmserve tokenizer`: train a tokenizer, or compare several on a text."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llmserve.errors import ConfigError, MissingDependencyError

from .clean_steps import DEFAULT_STEPS

if TYPE_CHECKING:
    from .progress_report import TerminalReporter

__all__ = ["add_arguments", "run"]

_COMPARED = ("char:512", "word:4096", "bpe:512", "bpe:1024", "bpe:2048", "bpe:4096")

_DESCRIPTION = "Train a tokenizer, or compare several."

_EXAMPLES = """\
examples:
  llmserve tokenizer train corpus/ --kind bpe --vocab-size 4096 --out tokenizer
  llmserve train --text corpus/ --tokenizer tokenizer --out run
  llmserve tokenizer compare corpus/
  llmserve tokenizer compare corpus/ --tokenizers bpe:4096 bpe:8192 other-model/ --steps 0
"""

_COMPARE = """\
Tokenizers side by side: each is trained on the text but its held-out part, or read from a folder,
and measured on the held-out part. Then the same small model (3 layers of width 128, 128 tokens of
context) is trained on each with as many multiplications, and evaluated in bits per byte.

whole words: share of words that are one token. coverage: share of bytes that the vocabulary holds
without spelling them byte by byte. worst: CPU seconds of 200,000 characters made to be slow.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    tasks = parser.add_subparsers(required=True, metavar="TASK")
    train = tasks.add_parser(
        "train",
        help="a tokenizer folder from a text",
        description="Train a tokenizer and write its folder.",
    )
    _add_text(train)
    train.add_argument("--kind", choices=("bpe", "word", "char"), default="bpe", help="(bpe)")
    train.add_argument(
        "--vocab-size", type=int, default=4096, metavar="N", help="most entries (default: 4096)"
    )
    train.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="to write")
    train.add_argument("--overwrite", action="store_true", help="replace an existing FOLDER")
    train.set_defaults(sub_run=_train)
    _add_compare(tasks)


def _add_compare(tasks: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    compare = tasks.add_parser(
        "compare",
        help="compression, coverage, speed, and bits per byte of a model on each",
        description=_COMPARE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_text(compare)
    compare.add_argument(
        "--tokenizers",
        nargs="+",
        default=list(_COMPARED),
        metavar="TOKENIZER",
        help=f"bpe:SIZE, word:SIZE, char:SIZE or a folder (default: {' '.join(_COMPARED)})",
    )
    compare.add_argument(
        "--steps",
        type=int,
        default=400,
        metavar="N",
        help="of the first tokenizer's model; the others get as many operations; 0: no models "
        "(default: 400)",
    )
    compare.add_argument(
        "--out", type=Path, metavar="FOLDER", help="keep tokenizers and runs; runs there go on"
    )
    compare.add_argument("--threads", type=int, metavar="N", help="of the training")
    compare.add_argument("--json", action="store_true", help="print JSON")
    compare.set_defaults(sub_run=_compare)


def _add_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="+", metavar="SOURCE", help="files, folders, patterns")
    parser.add_argument(
        "--separator", default="", metavar="TEXT", help="between two documents of one file"
    )
    parser.add_argument(
        "--text-field", default="text", metavar="NAME", help="field or column (default: text)"
    )
    parser.add_argument(
        "--cleaning",
        default=DEFAULT_STEPS,
        metavar="STEPS",
        help=f"with commas between, all or none (default: {DEFAULT_STEPS})",
    )


def run(args: argparse.Namespace) -> int:
    """Do what was asked for."""
    code: int = args.sub_run(args)
    return code


def _train(args: argparse.Namespace) -> int:
    from llmserve.text.tokenizer import Tokenizer

    from .corpus import read_documents
    from .tokenizer_folder import write_tokenizer

    found = read_documents(
        args.text, separator=args.separator, text_field=args.text_field, cleaning=args.cleaning
    )
    tokenizer = Tokenizer.train(args.kind, found.texts, vocab_size=args.vocab_size)
    write_tokenizer(args.out, tokenizer, overwrite=args.overwrite)
    print(
        f"{args.out}: {args.kind}, {tokenizer.vocab_size:,} tokens, from {len(found.texts):,} "
        f"documents; {found.cleaning.summary()}"
    )
    return 0


def _compare(args: argparse.Namespace) -> int:
    try:
        from .tokenizer_compare import compare_tokenizers, comparison_recipe, parse_choice
        from .tokenizer_table import render_comparison
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            str(error.name), extra="train", feature="comparing tokenizers"
        ) from error
    if "-" in args.text:
        raise ConfigError("standard input can be read only once: give files, folders or patterns")
    if args.steps < 0:
        raise ConfigError(f"--steps must be 0 or more, got {args.steps}")
    choices = [parse_choice(text) for text in args.tokenizers]
    recipe = comparison_recipe(
        steps=max(1, args.steps),
        threads=args.threads,
        separator=args.separator,
        text_field=args.text_field,
        cleaning=args.cleaning,
    )
    with tempfile.TemporaryDirectory(prefix="llmserve-tokenizers-") as temporary:
        out = (args.out or Path(temporary)) if args.steps else None
        rows = compare_tokenizers(choices, args.text, recipe, out, open_reporter=_open_reporter)
    print(json.dumps([row.as_json() for row in rows]) if args.json else render_comparison(rows))
    return 0


@contextmanager
def _open_reporter(name: str) -> Iterator[TerminalReporter]:
    from .progress_report import TerminalReporter

    with TerminalReporter() as reporter:
        reporter.note(f"{name}:")
        yield reporter
