"""The comparison with other programs in a few lines: what README.md shows of committed results.

One form of ours throughout, so that no row shows the form that suits it best; then every bar that
was missed, in whatever form. The whole of it is `peers_report.py`'s page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .machine import date_and_machine
from .peers_bars import Row, Verdict, best_peer, ratio_to, verdicts
from .peers_cells import shown_number, shown_range, shown_versions
from .peers_recorded import NOTE, SCALED, with_recorded
from .statistics import mean_of_runs

__all__ = ["peers_summary"]

Document = Mapping[str, Any]


def peers_summary(document: Document) -> str:
    """A table of one result: our figure, the best peer's, and how many times better ours is."""
    return "\n".join(_lines(document)) + "\n"


def _lines(document: Document) -> Iterator[str]:
    rows = with_recorded(document["shape"], document["rows"])
    ours = next(row for row in rows if row["is_ours"])
    yield (
        f"**Model {document['model']}**, ours with {ours['weights']}, {date_and_machine(document)}:"
    )
    yield ""
    yield "| tokens/s | llmserve | best other program | times it (95 %) |"
    yield "|---|---|---|---|"
    for title, surface, figure in _figures(document):
        mine = [row for row in rows if row["is_ours"] and row["surface"] == surface]
        row = next((row for row in mine if row["scheme"] == ours["scheme"]), None)
        if row is not None and row["figures"].get(figure):
            yield _table_row(title, row, best_peer(row, figure, rows), figure)
    if any(row["scheme"] == SCALED for row in rows):
        yield ""
        yield NOTE
    yield from _bars(verdicts(document["shape"], rows))
    versions = ", ".join(shown_versions(document["rows"]))
    yield from _folded("Command and versions", [f"`{document['command']}`; {versions}."])


def _figures(document: Document) -> Iterator[tuple[str, str, str]]:
    """Title, surface and name of each."""
    length = document["prefill_len"]
    yield f"reading a prompt of {length}", "process", f"prefill {length} tokens/s"
    for count in document["sequences"]:
        yield f"decoding, {count} at a time", "process", f"decode {count} tokens/s"
    for count in document["load"]["requests"]:
        yield f"over HTTP, {count} at a time", "http", f"http {count} tokens/s"


def _table_row(title: str, row: Row, peer: Row | None, figure: str) -> str:
    mine = shown_number(mean_of_runs(row["figures"][figure])[0])
    if peer is None:
        return f"| {title} | {mine} | | |"
    theirs = shown_number(mean_of_runs(peer["figures"][figure])[0])
    ratio, interval = ratio_to(row, peer, figure)
    spread = " (one round)" if interval is None else shown_range(interval)
    return (
        f"| {title} | {mine} | {theirs}, {peer['engine']} {peer['scheme']} | {ratio:.2f}{spread} |"
    )


def _bars(found: Sequence[Verdict]) -> Iterator[str]:
    if not found:
        return
    missed = [verdict for verdict in found if verdict.ratio < verdict.bar.times]
    reached = f"Of the {len(found)} bars set for this model, {len(found) - len(missed)} are reached"
    if not missed:
        yield from ("", f"{reached}.")
        return
    yield from _folded(
        f"{reached}; the others",
        [
            f"- {verdict.bar.where} {verdict.bar.what}, {verdict.scheme}: {verdict.ratio:.2f} of "
            f"{verdict.bar.times:g} times {verdict.peer}"
            for verdict in missed
        ],
    )


def _folded(title: str, lines: Sequence[str]) -> Iterator[str]:
    """Lines that open at a click."""
    yield from ("", f"<details><summary>{title}</summary>", "", *lines, "", "</details>")
