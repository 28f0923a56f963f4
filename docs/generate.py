"""Write docs/cli.md from the command line's own parsers (`make docs`).

A test compares the committed page with what this makes, so the page cannot lag behind the code,
and no option changes unnoticed.
"""

from __future__ import annotations

import argparse
import re
from importlib import import_module
from pathlib import Path

from llmserve.cli import VERBS

PAGE = Path(__file__).parent / "cli.md"


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


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
