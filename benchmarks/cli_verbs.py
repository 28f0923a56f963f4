"""A sub-verb of `llmserve bench`, made alike for all of them."""

from __future__ import annotations

import argparse

__all__ = ["Verbs", "add_verb"]

Verbs = argparse._SubParsersAction
"""Where sub-verbs are added."""


def add_verb(
    verbs: Verbs[argparse.ArgumentParser],
    name: str,
    summary: str,
    description: str,
    examples: str,
) -> argparse.ArgumentParser:
    """A parser for the sub-verb `name` that keeps the texts' lines and takes no short forms."""
    return verbs.add_parser(
        name,
        help=summary,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
