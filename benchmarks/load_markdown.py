"""A load test as Markdown: the same figures as the table and the page, to paste where people talk.

Made from the result's document alone. Texts come from the server and the command line, so what
Markdown would take as markup is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from .load_table import LATENCY_TITLES, server_facts, turn_facts

__all__ = ["RATE_TITLES", "latency_keys", "load_markdown"]

RATE_TITLES = {
    "request_throughput": "requests/s",
    "request_goodput": "goodput, requests/s",
    "output_throughput": "output tokens/s",
    "total_token_throughput": "input + output tokens/s",
}
MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~])")

Result = Mapping[str, object]


def load_markdown(result: Result, warnings: Sequence[str]) -> str:
    """The report of a run: `result` is its document."""
    parts = [
        _heading(result, warnings),
        _table(("", "per second", "95 %"), list(_rates(result))),
        _table(*_latencies(result)),
        _table(("the run", ""), [*server_facts(result), *turn_facts(result)]),
        _origin(result),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def latency_keys(result: Result, name: str) -> list[str]:
    """The keys of one latency in a result, `mean_ttft_ms` and so on, in their order."""
    pattern = re.compile(rf"(mean|median|std|p[\d.]+)_{name}_ms")
    return [key for key in result if pattern.fullmatch(key)]


def _heading(result: Result, warnings: Sequence[str]) -> str:
    cut = ", interrupted" if result["interrupted"] else ""
    kinds = ", ".join(f"{n} x {kind}" for kind, n in _dict(result["errors_by_kind"]).items())
    lines = [
        f"# Load test of {_plain(result['model_id'])}",
        f"{_plain(result['traffic'])}, {_plain(result['base_url'])}{_plain(result['endpoint'])}",
        f"{result['completed']} requests completed, {result['failed']} failed in "
        f"{result['duration']:.1f} s{cut}.",
        *([f"**Failures:** {_plain(kinds)}"] if kinds else []),
        *(f"**Warning:** {_plain(warning)}" for warning in warnings),
    ]
    return "\n\n".join(lines)


def _rates(result: Result) -> Iterator[tuple[str, str, str]]:
    for key, title in RATE_TITLES.items():
        if (value := result[key]) is not None:
            yield title, _number(value), _interval(result, key)


def _latencies(result: Result) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Head and rows: a figure and its interval in each cell."""
    head: Sequence[str] = ()
    rows: list[Sequence[str]] = []
    for name, title in LATENCY_TITLES.items():
        if keys := latency_keys(result, name):
            head = ("milliseconds", *(key.removesuffix(f"_{name}_ms") for key in keys))
            cells = [f"{_number(result[key])} {_interval(result, key)}".strip() for key in keys]
            rows.append((title, *cells))
    return head, rows


def _origin(result: Result) -> str:
    facts = {**_dict(result["machine"]), **_dict(result["versions"])}
    words = ", ".join(f"{_plain(key)} {_plain(value)}" for key, value in facts.items())
    command = str(result["command"]).replace("`", "'")
    return f"`{command}`\n\n{words}; {result['date']}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, numbers to the right; empty without rows."""
    if not rows:
        return ""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def _interval(result: Result, key: str) -> str:
    intervals = result["intervals"]
    pair = intervals.get(key) if isinstance(intervals, dict) else None
    return f"({pair[0]:.4g} to {pair[1]:.4g})" if pair else ""


def _number(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else "-"


def _plain(value: object) -> str:
    return MARKUP.sub(r"\\\1", str(value)).replace("\n", " ")


def _dict(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}
