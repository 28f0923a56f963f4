"""`llmserve bench compare`: what is made of load tests that were saved."""

from __future__ import annotations

import argparse
from pathlib import Path

from .cli_verbs import Verbs, add_verb

__all__ = ["add_load_verbs"]

COMPARE_DESCRIPTION = """\
Say of each figure of two load tests whether B was faster than A, how many times, and how sure that
is. A and B are results of `bench serve --save-result`, or folders of them: the more runs of each,
taken in turn, the smaller the differences that can be shown.

The last line is one JSON document. Exits with 0 whatever the verdict.
"""

COMPARE_EXAMPLES = """\
examples:
  llmserve bench compare before.json after.json
  llmserve bench compare runs-before runs-after
"""


def add_load_verbs(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Declare the verbs and their options."""
    compare = add_verb(
        verbs, "compare", "which load test was faster", COMPARE_DESCRIPTION, COMPARE_EXAMPLES
    )
    compare.add_argument("a", metavar="A", type=Path, help="a result, or a folder of repeated runs")
    compare.add_argument("b", metavar="B", type=Path, help="what it is compared with, alike")
    compare.set_defaults(sub_run=_run_compare)


def _run_compare(args: argparse.Namespace) -> int:
    from .compare import bench_compare

    return bench_compare(args.a, args.b)
