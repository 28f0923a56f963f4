"""Write docs/cli.md from the parsers; peers.md, quality.md and the figures of README.md and
planning.md from results.

`make docs` runs it.

A test compares the committed pages with what this makes, so no page can lag behind the code, no
option changes unnoticed, and no figure is changed by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from llmserve.benchmarks.peers_report import peers_markdown
from llmserve.benchmarks.peers_summary import peers_summary
from llmserve.benchmarks.plan_page import plan_markdown
from llmserve.benchmarks.quality_page import quality_markdown
from llmserve.cli import VERBS

PAGE = Path(__file__).parent / "cli.md"
PEERS_PAGE = Path(__file__).parent / "peers.md"
QUALITY_PAGE = Path(__file__).parent / "quality.md"
PLANNING_PAGE = Path(__file__).parent / "planning.md"
README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(__file__).parent / "results"
NO_RESULT = "No result of this version yet.\n"
SHAPES = "SML"
SECTION = re.compile(r"(<!-- (\w+): written by make docs -->\n).*?(<!-- end of \2 -->)", re.DOTALL)

PEERS_INTRODUCTION = """\
# llmserve beside other programs

Made by `make docs` from the results in [results](results) that `make bench-peers` wrote; nothing
here is typed by hand. How it is measured, and how to repeat it: [benchmarks](benchmarks.md).
"""


QUALITY_INTRODUCTION = """\
# What a model's forms weigh, give and cost

Made by `make docs` from the results in [results](results) that `llmserve bench quality` wrote;
nothing here is typed by hand. How it is measured, and how to repeat it:
[benchmarks](benchmarks.md#what-quantized-forms-cost).
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
    parts = [peers_markdown(result) for result in _peers_results()]
    return "\n".join([PEERS_INTRODUCTION, *(parts or [NO_RESULT])])


def render_quality() -> str:
    """The page of what forms cost: a part for each result."""
    names = [path.stem for path in sorted(RESULTS.glob("quality-*.json"))]
    parts = [quality_markdown(_result(name), f"results/{name}.svg") for name in names]
    return "\n".join([QUALITY_INTRODUCTION, *(parts or [NO_RESULT])])


def _peers_results() -> list[dict[str, Any]]:
    """By the shapes' size."""
    results = [_result(path.stem) for path in sorted(RESULTS.glob("peers-*.json"))]
    return sorted(results, key=lambda result: SHAPES.find(result["shape"] or " "))


def _result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def render_sections(text: str) -> str:
    """A page's `text` with its marked sections made anew from results."""
    sections = {"demo": _demo_section, "peers": _peers_section, "plan": _plan_section}
    return SECTION.sub(lambda found: found[1] + sections[found[2]]() + found[3], text)


def _peers_section() -> str:
    return "\n".join([peers_summary(result) for result in _peers_results()] or [NO_RESULT])


def _plan_section() -> str:
    lines = (RESULTS / "plan.jsonl").read_text(encoding="utf-8").splitlines()
    return plan_markdown([json.loads(line) for line in lines])


def _demo_section() -> str:
    text = " ".join(_demo_sentences())
    return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False) + "\n"


def _demo_sentences() -> Iterator[str]:
    training, speed = _result("demo-training"), _result("throughput-demo")
    machine, date = speed["machine"], speed["date"]
    yield (
        f"On {machine['cores']} cores of an {machine['cpu']} ({date[:4]}-{date[4:6]}-{date[6:8]}) "
        f"the demo's model, {training['parameters'] / 1e6:.1f} million parameters trained for "
        f"{training['seconds'] / 60:.0f} minutes, reaches {training['bits_per_byte']:.2f} bits per "
        "byte on held-out text."
    )
    for scheme in ("int8", "int4"):
        report = _result(f"demo-{scheme}")
        yield (
            f"[{scheme}](docs/results/demo-{scheme}.json) makes it "
            f"{report['bytes_before'] / report['bytes_after']:.1f} times smaller for "
            f"{report['comparison']['mean_kl']:.2g} nats of KL divergence."
        )
    rates = ", ".join(
        f"{row['output_throughput']:,.0f} for {row['concurrency']}" for row in speed["concurrency"]
    )
    versions = ", ".join(f"{name} {version}" for name, version in speed["versions"].items())
    yield (
        f"In {speed['executed_form']} it generates, in tokens/s by requests at a time, {rates} "
        f"(`{speed['command']}`; {versions}). More: [training](docs/training.md), "
        "[benchmarks](docs/benchmarks.md)."
    )


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    PEERS_PAGE.write_text(render_peers(), encoding="utf-8")
    QUALITY_PAGE.write_text(render_quality(), encoding="utf-8")
    for page in (README, PLANNING_PAGE):
        page.write_text(render_sections(page.read_text(encoding="utf-8")), encoding="utf-8")
