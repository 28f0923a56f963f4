"""A load test as one HTML page that needs nothing else: figures, distributions and a timeline.

Made for a person with a minute: what the load was, what came of it and how sure that is, how
latencies are spread, and when in the run things went wrong. Every text is escaped, model names and
error messages come from the server. No scripts; light and dark follow the reader's system.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import chain, pairwise
from statistics import median

import numpy as np

from .load_markdown import RATE_TITLES, latency_keys
from .load_table import LATENCY_TITLES, server_facts, turn_facts
from .metrics import samples_by_request
from .plots import PAGE_STYLE, Series, line_plot
from .record import RequestRecord

__all__ = ["load_page"]

NUM_SLICES = 60
"""Most stretches that a run is cut into, of a second each or longer."""
NUM_POINTS = 200
"""Most points of a line: a page stays small however long the run was."""


def load_page(
    result: Mapping[str, object],
    records: Sequence[RequestRecord],
    warnings: Sequence[str],
    *,
    start_s: float,
) -> str:
    """The page of a run: `result` is its document, `records` what ended, from `start_s` on."""
    good = [record for record in records if record.is_success]
    title = escape(f"Load test of {result['model_id']}")
    parts = [
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<style>{PAGE_STYLE}</style></head><body>\n<h1>{title}</h1>",
        *_heading(result, warnings),
        *_rates(result),
        *_latencies(result),
        *_distributions(good),
        *_timeline(good, start_s),
        *_server(result),
        *_origin(result),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _heading(result: Mapping[str, object], warnings: Sequence[str]) -> Iterator[str]:
    yield _paragraph(f"{result['traffic']}, {result['base_url']}{result['endpoint']}", "soft")
    cut = ", interrupted" if result["interrupted"] else ""
    yield _paragraph(
        f"{result['completed']} requests completed, {result['failed']} failed in "
        f"{result['duration']:.1f} s{cut}."
    )
    errors = result["errors_by_kind"]
    if isinstance(errors, dict) and errors:
        kinds = ", ".join(f"{number} x {kind}" for kind, number in errors.items())
        yield _paragraph(f"Failures: {kinds}", "warning")
    yield from (_paragraph(warning, "warning") for warning in warnings)


def _rates(result: Mapping[str, object]) -> Iterator[str]:
    yield "<h2>Rates</h2><div class='scroll'><table>"
    yield "<tr><th></th><th>per second</th><th>95 % of runs like this</th></tr>"
    for key, title in RATE_TITLES.items():
        if (value := result[key]) is not None:
            yield f"<tr><th>{title}</th><td>{value:.2f}</td><td>{_sure(result, key)}</td></tr>"
    yield "</table></div>"


def _latencies(result: Mapping[str, object]) -> Iterator[str]:
    """A row for each latency that the result holds, with the interval beneath each figure."""
    yield "<h2>Latencies in milliseconds, with 95 % intervals</h2><div class='scroll'><table>"
    has_head = False
    for name, title in LATENCY_TITLES.items():
        ending, keys = f"_{name}_ms", latency_keys(result, name)
        if keys and not has_head:
            has_head = True
            heads = "".join(f"<th>{key.removesuffix(ending)}</th>" for key in keys)
            yield f"<tr><th></th>{heads}</tr>"
        if keys:
            cells = "".join(
                f"<td>{_number(result[key])}<small>{_sure(result, key)}</small></td>"
                for key in keys
            )
            yield f"<tr><th>{title}</th>{cells}</tr>"
    yield "</table></div>"


def _distributions(good: Sequence[RequestRecord]) -> Iterator[str]:
    """Two plots: what a request waits for, and what a token does; their scales differ."""
    samples = {
        name: sorted(chain.from_iterable(values))
        for name, values in samples_by_request(good).items()
    }
    groups = (("ttft", "e2el"), ("tpot", "itl"))
    yield "<h2>How latencies are spread</h2>"
    yield _paragraph("The share of requests, or of gaps, that waited no longer than so.", "soft")
    for names in groups:
        series = [Series(name=name.upper(), points=_shares(samples[name])) for name in names]
        yield line_plot(series, x_label="milliseconds", y_label="percent")


def _timeline(good: Sequence[RequestRecord], start_s: float) -> Iterator[str]:
    slices = _slices(good, start_s)
    yield "<h2>The run, second by second</h2>"
    yield line_plot(
        [Series(name="under way", points=_concurrency(good, start_s))],
        x_label="seconds",
        y_label="requests",
    )
    yield line_plot(
        [Series(name="output", points=[(time_s, rate) for time_s, rate, _ in slices])],
        x_label="seconds",
        y_label="tokens/s",
    )
    yield _paragraph(
        "The longest gap within an answer, and the longest wait for a first token.", "soft"
    )
    gaps = [
        (later - start_s, (later - earlier) * 1000.0)
        for record in good
        for earlier, later in pairwise(record.chunk_times_s)
    ]
    firsts = [(r.chunk_times_s[0] - start_s, r.ttft_s * 1000.0) for r in good]
    series = [
        Series(name="gaps", points=_peaks(gaps), is_dots=True),
        Series(name="TTFT", points=_peaks(firsts), is_dots=True),
    ]
    yield line_plot(series, x_label="seconds", y_label="milliseconds")
    yield "<h2>Throughput against latency</h2>"
    yield _paragraph(
        "Each dot is a stretch of the run: what the server put out in it, and what requests that "
        "were due in it waited for their first token (median).",
        "soft",
    )
    dots = [(rate, wait) for _, rate, wait in slices if wait is not None]
    yield line_plot(
        [Series(name="TTFT", points=dots, is_dots=True)],
        x_label="output tokens/s",
        y_label="milliseconds",
    )


def _server(result: Mapping[str, object]) -> Iterator[str]:
    """What the server told of itself, and what each turn of conversations cost."""
    facts = [*server_facts(result), *turn_facts(result)]
    if not facts:
        return
    yield "<h2>What the server told, and what turns cost</h2><table class='words'>"
    yield from (
        f"<tr><th>{escape(title)}</th><td>{escape(text)}</td></tr>" for title, text in facts
    )
    yield "</table>"
    metrics = result["server_metrics"]
    looks = metrics.get("timeline", []) if isinstance(metrics, dict) else []
    lines = [
        Series(
            name=name, points=[(look[0], look[place]) for look in looks if look[place] is not None]
        )
        for place, name in ((1, "running"), (2, "queue"))
    ]
    if any(line.points for line in lines):
        yield line_plot(lines, x_label="seconds", y_label="requests in the server")
    usage = [(look[0], look[3] * 100.0) for look in looks if look[3] is not None]
    if usage:
        yield line_plot(
            [Series(name="KV cache", points=usage)], x_label="seconds", y_label="percent in use"
        )


def _origin(result: Mapping[str, object]) -> Iterator[str]:
    machine, versions = result["machine"], result["versions"]
    yield "<h2>Where it was measured</h2>"
    yield f"<p><code>{escape(str(result['command']))}</code></p>"
    for facts in (machine, versions, result["noise"]):
        if isinstance(facts, dict):
            yield _paragraph(", ".join(f"{key}: {_fact(value)}" for key, value in facts.items()))
    yield _paragraph(f"{result['date']}", "soft")


def _shares(ordered_s: Sequence[float]) -> list[tuple[float, float]]:
    """The distribution at up to `NUM_POINTS` percents: (milliseconds, percent)."""
    if not ordered_s:
        return []
    percents = np.linspace(0.0, 100.0, NUM_POINTS)
    values = np.percentile(ordered_s, percents) * 1000.0
    return list(zip(values.tolist(), percents.tolist(), strict=True))


def _concurrency(good: Sequence[RequestRecord], start_s: float) -> list[tuple[float, float]]:
    """Requests between their send and their last token, at the corners of each step."""
    edges = sorted(
        [(r.sent_s - start_s, 1) for r in good]
        + [(r.chunk_times_s[-1] - start_s, -1) for r in good]
    )
    corners, depth = [(0.0, 0.0)], 0
    for time_s, change in edges:
        corners += [(time_s, float(depth)), (time_s, float(depth + change))]
        depth += change
    if len(corners) <= 2 * NUM_POINTS:
        return corners
    return _peaks(corners)


def _slices(
    good: Sequence[RequestRecord], start_s: float
) -> list[tuple[float, float, float | None]]:
    """Equal stretches of the run: middle, output tokens per second, median TTFT in milliseconds.

    A stretch in which no request was due has no TTFT.
    """
    if not good:
        return []
    length_s = max(max(r.chunk_times_s[-1] for r in good) - start_s, 1e-9)
    number = max(1, min(NUM_SLICES, round(length_s)))
    edges = (start_s, start_s + length_s)
    times = [time_s for record in good for time_s in record.chunk_times_s]
    counts = [count for record in good for count in record.chunk_tokens]
    tokens, _ = np.histogram(times, bins=number, range=edges, weights=counts)
    waits: list[list[float]] = [[] for _ in range(number)]
    for record in good:
        place = int((record.origin_s - start_s) / length_s * number)
        waits[min(max(place, 0), number - 1)].append(record.ttft_s * 1000.0)
    step_s = length_s / number
    return [
        ((place + 0.5) * step_s, float(tokens[place]) / step_s, median(wait) if wait else None)
        for place, wait in enumerate(waits)
    ]


def _peaks(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The highest point in each of `NUM_POINTS` equal stretches of time."""
    last = max((time for time, _ in points), default=0.0)
    highest: dict[int, tuple[float, float]] = {}
    for point in points:
        place = int(point[0] / last * (NUM_POINTS - 1)) if last > 0 else 0
        if place not in highest or point[1] > highest[place][1]:
            highest[place] = point
    return [highest[place] for place in sorted(highest)]


def _sure(result: Mapping[str, object], key: str) -> str:
    intervals = result["intervals"]
    pair = intervals.get(key) if isinstance(intervals, dict) else None
    return f"{pair[0]:.4g} to {pair[1]:.4g}" if pair else ""


def _number(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "-"


def _fact(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _paragraph(text: str, kind: str = "") -> str:
    return f"<p class='{kind}'>{escape(text)}</p>" if kind else f"<p>{escape(text)}</p>"
