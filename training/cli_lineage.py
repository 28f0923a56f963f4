"""`llmserve lineage`: what a model was made from, and whether that is still what it was."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .lineage_check import Stage

__all__ = ["add_arguments", "run"]

_DESCRIPTION = """\
What a model was made from, stage by stage, and whether that is still what it was: verified,
changed, or absent where nothing is here to compare with. The run is looked for in the folder that
MODEL lies in; the source of a tuned, merged, quantized or exported model beside it, among the
models of runs beside it and of those beside its own run. Exit code 1 where something has changed.
"""

_EXAMPLES = """\
examples:
  llmserve lineage run/model
  llmserve lineage run/model-int8 --text corpus/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    parser.add_argument("model", type=Path, metavar="MODEL", help="model folder")
    parser.add_argument(
        "--text",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help="the text it was trained on: compare its files",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the chain."""
    from .lineage_check import check_lineage

    stages = check_lineage(args.model, args.text)
    if args.json:
        rows = [
            {"stage": stage.name, "status": stage.status, "detail": stage.detail, **stage.entry}
            for stage in stages
        ]
        print(json.dumps(rows))
    else:
        print("\n".join(_line(stage) for stage in stages))
    return int(any(stage.status == "changed" for stage in stages))


def _line(stage: Stage) -> str:
    digest = str(stage.entry.get("sha256") or stage.entry.get("source") or "")[:16]
    facts = [
        f"{name} {_short(value)}"
        for name, value in stage.entry.items()
        if name not in ("sha256", "source", "text_sha256") and isinstance(value, int | str)
    ]
    facts += [file["name"] for file in stage.entry.get("files", [])[:3]]
    detail = f"({stage.detail})" if stage.detail else ""
    return f"{stage.name:<13} {digest:<17} {stage.status:<9} {', '.join([detail, *facts])}".rstrip()


def _short(value: int | str) -> str:
    """A digest by its beginning, as it is shown everywhere; other values whole."""
    text = str(value)
    return text[:16] if len(text) == 64 else text
