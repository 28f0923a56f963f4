"""`llmserve demo`: the whole way from text to a loaded server, on a small model."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_arguments", "run"]

_DESCRIPTION = """\
Train a small model on the interpreter's own manual, quantize it to int8 and int4 with the cost of
each, serve the int8 one, send it a short load test, and stay up.

Everything is kept in one folder. Interrupt it at any moment: the next run goes on from there.
"""

_EXAMPLES = """\
examples:
  llmserve demo                    about 5 minutes on 2 cores, then serves until Ctrl-C
  llmserve demo --once             the same, then exits
  llmserve demo --scheme int4      serve the int4 model instead
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "--dir", type=Path, default=Path("demo-run"), help="folder of the run (default: demo-run)"
    )
    parser.add_argument("--once", action="store_true", help="exit after the load test")
    parser.add_argument(
        "--scheme", choices=("int8", "int4"), default="int8", help="model to serve (default: int8)"
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="port of the server; 0: any (default: 8000)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the stages in order."""
    from .demo import Demo

    return Demo(folder=args.dir, scheme=args.scheme, port=args.port).run(once=args.once)
