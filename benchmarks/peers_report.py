"""The comparison with other programs as a page: Markdown from the document alone.

So the page of a committed result can be made again from it, and a test can see that nobody changed
a figure by hand (docs/generate.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .machine import date_and_machine
from .peers_bars import Row, Verdict, best_peer, ratio_to, verdicts
from .peers_cells import shown_number, shown_range, shown_versions
from .peers_limits import bandwidth_table, busy_table
from .peers_recorded import NOTE, SCALED, with_recorded
from .statistics import mean_of_runs

__all__ = ["peers_markdown"]

Document = Mapping[str, Any]

HTTP_TITLES = {
    "tokens/s": "output tokens/s",
    "TTFT p50 ms": "time to first token, median, ms",
    "ITL p99 ms": "time between tokens, p99, ms",
}
NO_SERVER = "OpenVINO GenAI and onnxruntime-genai bring no HTTP server, so they are above only."


def peers_markdown(document: Document) -> str:
    """The page: what was run, a table in process, tables over HTTP, and the bars."""
    return "\n".join(_page(document)) + "\n"


def _page(document: Document) -> Iterator[str]:
    rows = with_recorded(document["shape"], document["rows"])
    yield f"## Model {document['model']} on {document['machine']['cpu']}"
    yield ""
    yield from _heading(document)
    yield ""
    prefill = f"prefill {document['prefill_len']}"
    names = [prefill, *(f"decode {count}" for count in document["sequences"])]
    process = [row for row in rows if row["surface"] == "process"]
    yield (
        f"In process, tokens/s: a prompt of {document['prefill_len']} tokens, and "
        f"{document['decode_len']} tokens of each of N sequences after prompts of "
        f"{document['input_len']}."
    )
    yield ""
    yield from _table(process, {name: f"{name} tokens/s" for name in names})
    yield ""
    yield from bandwidth_table(document, process)
    yield from busy_table(document, process)
    yield from _http_part(document, [row for row in rows if row["surface"] == "http"])
    yield from _bars(verdicts(document["shape"], rows))


def _heading(document: Document) -> Iterator[str]:
    yield (
        f"{date_and_machine(document)}. Rounds: {_rounds(document)}. "
        "Each figure is the geometric mean of its rounds, beneath it its 95 % interval; ours also "
        "has how many times better it is than the best peer, the ratio taken within each round."
    )
    yield ""
    yield f"    {document['command']}"
    yield ""
    yield f"Versions: {', '.join(shown_versions(document['rows']))}."


def _http_part(document: Document, rows: Sequence[Row]) -> Iterator[str]:
    load = document["load"]
    counts = ", ".join(f"{total} for {count}" for count, total in load["requests"].items())
    yield (
        f"Over HTTP, {load['input_len']} tokens in, {load['output_len']} out, streamed, greedy, "
        f"{counts} at a time; client and server on the same cores. {NO_SERVER}"
    )
    if any(row["scheme"] == SCALED for row in rows):
        yield ""
        yield NOTE
    for ending, title in HTTP_TITLES.items():
        yield ""
        yield f"{title[0].upper()}{title[1:]}:"
        yield ""
        columns = {f"{count} at a time": f"http {count} {ending}" for count in load["requests"]}
        yield from _table(rows, columns)
    yield ""
    yield "Until ready, and memory of all processes after the load:"
    yield ""
    yield from _table(rows, {"ready, s": "ready s", "resident, MB": "resident MB"}, is_plain=True)
    for row in rows:
        if row["problem"]:
            yield ""
            yield f"{row['engine']} {row['weights']} was left out: {row['problem']}."


def _table(
    rows: Sequence[Row], columns: Mapping[str, str], *, is_plain: bool = False
) -> Iterator[str]:
    yield f"| engine | weights, cache | {' | '.join(columns)} |"
    yield f"|---|---|{'---|' * len(columns)}"
    for row in rows:
        cells = (_cell(row, figure, () if is_plain else rows) for figure in columns.values())
        yield f"| {row['engine']} | {row['weights']}; {row['cache']} | {' | '.join(cells)} |"


def _cell(row: Row, figure: str, rows: Sequence[Row]) -> str:
    if not row["figures"].get(figure):
        return ""
    value, interval = mean_of_runs(row["figures"][figure])
    shown = f"{shown_number(value)}{shown_range(interval)}"
    if row["is_ours"] and (peer := best_peer(row, figure, rows)) is not None:
        ratio, sure = ratio_to(row, peer, figure)
        shown += f"<br>**{ratio:.2f}x**{shown_range(sure)}"
    return shown


def _bars(found: Sequence[Verdict]) -> Iterator[str]:
    if not found:
        return
    yield ""
    yield "The bars, and whether this run reached them:"
    yield ""
    yield "| figure | ours | best peer that counts | times | bar | |"
    yield "|---|---|---|---|---|---|"
    for verdict in found:
        ours = f"{verdict.scheme}: {shown_number(verdict.ours)}"
        yield (
            f"| {verdict.bar.where}: {verdict.bar.what} | {ours} "
            f"| {verdict.peer}: {shown_number(verdict.theirs)} "
            f"| {verdict.ratio:.2f}{shown_range(verdict.interval)} | {verdict.bar.times:g} "
            f"| {verdict.says} |"
        )


def _rounds(document: Document) -> str:
    def most(surface: str) -> int:
        rows = [row for row in document["rows"] if row["surface"] == surface]
        return max((len(runs) for row in rows for runs in row["figures"].values()), default=0)

    return f"{most('process')} in process, {most('http')} over HTTP"
