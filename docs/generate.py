"""Write docs/cli.md from the parsers, docs/peers.md from committed results (`make docs`).

A test compares the committed pages with what this makes, so no page can lag behind the code, no
option changes unnoticed, and no figure is changed by hand.
"""

from __future__ import annotations

import argparse
import json
import re
from importlib import import_module
from pathlib import Path

from llmserve.benchmarks.peers_report import peers_markdown
from llmserve.cli import VERBS

PAGE = Path(__file__).parent / "cli.md"
PEERS_PAGE = Path(__file__).parent / "peers.md"
PEERS_RESULTS = "results/peers-*.json"

PEERS_INTRODUCTION = """\
# llmserve beside other programs

Made by `make docs` from the results in [results](results) that `make bench-peers` wrote; nothing
here is typed by hand. How it is measured, and how to repeat it: [benchmarks](benchmarks.md).
"""


def render() -> str:
    """The whole page."""
    parts = [
        "# Command line\n",
        "Made by `make docs` from the parsers; `llmserve VERB --help` says the same.\n",
    ]
    for verb, (module_name, summary) in VERBS.items():
        parser = argparse.ArgumentParser(prog=f"llmserve {verb}", add_help=False)
        import_module(module_name).add_arguments(parser)
        parts += _section(parser, parser.description or summary)
    return "\n".join(parts)


def _section(parser: argparse.ArgumentParser, summary: str) -> list[str]:
    lines = [f"## {parser.prog}\n", f"{_capital(summary.strip())}\n"]
    rows, subs = [], []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            subs += [(sub, _sub_help(action, name)) for name, sub in action.choices.items()]
        elif action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction):
            rows.append(f"| {_name(action)} | {_cell(_help(parser, action))} |")
    if rows:
        lines += ["| argument | meaning |", "| --- | --- |", *rows, ""]
    for sub, sub_summary in subs:
        lines += _section(sub, sub.description or sub_summary)
    return lines


def _sub_help(action: argparse._SubParsersAction, name: str) -> str:
    return next((c.help or "" for c in action._choices_actions if c.dest == name), "")


def _name(action: argparse.Action) -> str:
    value = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
    if isinstance(value, tuple):
        value = " ".join(value)
    if action.choices is not None:
        value = "\\|".join(map(str, action.choices))
    if not action.option_strings:
        return f"`{value}`"
    return f"`{' '.join([', '.join(action.option_strings), value]).strip()}`"


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return parser._get_formatter()._expand_help(action) if action.help else ""


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def _capital(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", ":", "\n")) else text + "."


def render_peers() -> str:
    """The page of the comparison with other programs: a part for each result."""
    paths = sorted(Path(__file__).parent.glob(PEERS_RESULTS))
    results = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    parts = [peers_markdown(result) for result in results]
    return "\n".join([PEERS_INTRODUCTION, *(parts or ["No result of this version yet.\n"])])


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    PEERS_PAGE.write_text(render_peers(), encoding="utf-8")
