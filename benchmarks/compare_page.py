"""Two load tests over time, beside each other: a page for people, and the plot of goodput alone.

Made from results that were saved with `--save-detailed`, so any two runs of one load can be laid
beside each other later. Requests are put into stretches by when they were due, so that a queue
shows where it began and not where it ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median
from typing import Any

from llmserve.errors import ConfigError

from .metrics import meets_slos
from .plots import PAGE_STYLE, Series, line_plot

__all__ = ["Timeline", "compare_page", "goodput_plot", "timeline_of"]

NUM_STRETCHES = 60
"""Most stretches that the time is cut into, of a second each or longer."""

Result = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """One run in equal stretches of time; entry i is of the requests due in stretch i."""

    stretch_s: float
    due: Sequence[float]
    """Requests per second that were due."""
    good: Sequence[float]
    """Of them, per second, those that met the objectives; all that succeeded if there are none."""
    ttft_ms: Sequence[float | None]
    """Median; None: nothing that was due came back."""
    tpot_ms: Sequence[float | None]
    """Median; None: no answer of two tokens."""

    @property
    def attained(self) -> float:
        """Share of all requests that met the objectives."""
        return sum(self.good) / sum(self.due)

    def series(self, name: str, values: Sequence[float | None]) -> Series:
        """One of the lists over time."""
        middles = ((place + 0.5) * self.stretch_s for place in range(len(values)))
        points = zip(middles, values, strict=True)
        return Series(name=name, points=[(x, y) for x, y in points if y is not None])


@dataclass(frozen=True, slots=True)
class _Request:
    due_s: float
    is_good: bool
    ttft_s: float | None
    tpot_s: float | None


def timeline_of(result: Result, slos_ms: Mapping[str, float], *, span_s: float) -> Timeline:
    """The run of `result` over `span_s` seconds.

    Raises:
        ConfigError: the result was saved without the figures of each request, or holds none.
    """
    if not result.get("start_times"):
        raise ConfigError(
            "a plot over time needs every request's figures: save results with --save-detailed"
        )
    requests = list(_requests(result, slos_ms))
    number = max(1, min(NUM_STRETCHES, round(span_s)))
    stretch_s = span_s / number
    stretches: list[list[_Request]] = [[] for _ in range(number)]
    for request in requests:
        stretches[min(int(request.due_s / stretch_s), number - 1)].append(request)
    return Timeline(
        stretch_s=stretch_s,
        due=[len(these) / stretch_s for these in stretches],
        good=[sum(request.is_good for request in these) / stretch_s for these in stretches],
        ttft_ms=[_median_ms([request.ttft_s for request in these]) for these in stretches],
        tpot_ms=[_median_ms([request.tpot_s for request in these]) for these in stretches],
    )


def span_of(results: Sequence[Result]) -> float:
    """Seconds from the start to when the last request of any run was due."""
    return max((max(result.get("start_times") or (0.0,)) for result in results), default=0.0) or 1.0


def goodput_plot(names: Sequence[str], timelines: Sequence[Timeline]) -> str:
    """The rate of requests that were due, and of those that each run answered in time."""
    lines = [one.series(name, one.good) for name, one in zip(names, timelines, strict=True)]
    due = timelines[0].series("due", timelines[0].due)
    return line_plot([*lines, due], x_label="seconds", y_label="requests/s in time")


def compare_page(
    names: Sequence[str],
    timelines: Sequence[Timeline],
    slos_ms: Mapping[str, float],
    sentences: Mapping[str, str],
) -> str:
    """One HTML page: `names` and `timelines` of A and B, and `sentences` by figure."""
    title = escape(" and ".join(names))
    parts = [
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<style>{PAGE_STYLE}</style></head><body>\n<h1>{title}</h1>",
        *_attained(names, timelines, slos_ms),
        "<h2>Requests in time</h2>",
        goodput_plot(names, timelines),
        *_latencies(names, timelines),
        "<h2>Figures of the whole runs</h2><table class='words'>",
        *(f"<tr><th>{escape(key)}</th><td>{escape(s)}</td></tr>" for key, s in sentences.items()),
        "</table></body></html>\n",
    ]
    return "\n".join(parts)


def _attained(
    names: Sequence[str], timelines: Sequence[Timeline], slos_ms: Mapping[str, float]
) -> Iterator[str]:
    bounds = ", ".join(f"{name} {bound:g} ms" for name, bound in slos_ms.items())
    yield f"<p class='soft'>Objectives: {bounds or 'that it succeeds'}. Requests count where they \
were due.</p>"
    for letter, name, one in zip("AB", names, timelines, strict=True):
        yield f"<p>{letter} is {escape(name)}: {one.attained:.1%} of the requests in time</p>"


def _latencies(names: Sequence[str], timelines: Sequence[Timeline]) -> Iterator[str]:
    pairs = list(zip(names, timelines, strict=True))
    for title, field in (("Time to first token", "ttft_ms"), ("Time per token", "tpot_ms")):
        yield f"<h2>{title}, median of each stretch</h2>"
        lines = [one.series(name, getattr(one, field)) for name, one in pairs]
        yield line_plot(lines, x_label="seconds", y_label="milliseconds")


def _requests(result: Result, slos_ms: Mapping[str, float]) -> Iterator[_Request]:
    columns = ("start_times", "ttfts", "latencies", "output_lens", "errors")
    for due_s, ttft_s, e2e_s, num_tokens, error in zip(
        *(result[column] for column in columns), strict=True
    ):
        if error:
            yield _Request(due_s, is_good=False, ttft_s=None, tpot_s=None)
            continue
        tpot_s = (e2e_s - ttft_s) / (num_tokens - 1) if num_tokens > 1 else None
        is_good = meets_slos(slos_ms, ttft_s=ttft_s, tpot_s=tpot_s, e2e_s=e2e_s)
        yield _Request(due_s, is_good=is_good, ttft_s=ttft_s, tpot_s=tpot_s)


def _median_ms(values_s: Sequence[float | None]) -> float | None:
    known = [value for value in values_s if value is not None]
    return 1000.0 * median(known) if known else None
