from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from llmserve.benchmarks.page import NUM_POINTS, _slices, load_page
from llmserve.benchmarks.plots import Series, line_plot, tick_values
from llmserve.benchmarks.record import RequestRecord
from support.records import make_record

RECORDS = [
    make_record([0.5 + n, 0.52 + n, 0.60 + n], index=n, origin_s=float(n), tokens=3)
    for n in range(30)
]
RESULT: dict[str, object] = {
    "model_id": "<script>alert(1)</script>",
    "traffic": "closed loop: 1 at a time",
    "base_url": "http://h:1",
    "endpoint": "/v1/completions",
    "interrupted": False,
    "completed": 30,
    "failed": 2,
    "errors_by_kind": {"timeout": 2},
    "duration": 30.0,
    "request_throughput": 1.0,
    "request_goodput": None,
    "output_throughput": 3.0,
    "total_token_throughput": 13.0,
    "mean_ttft_ms": 500.0,
    "p99_ttft_ms": None,
    "mean_ttft_from_send_ms": 499.0,
    "intervals": {"output_throughput": [2.5, 3.5], "mean_ttft_ms": [490.0, 510.0]},
    "server_metrics": None,
    "noise": {"steal_percent": 1.23456},
    "machine": {"cpu": "a"},
    "versions": {"python": "3"},
    "command": "llmserve bench serve",
    "date": "20260102-030405",
}


def page_of(records: list[RequestRecord]) -> str:
    return load_page(RESULT, records, ["the client was late"], start_s=0.0)


class Balance(HTMLParser):
    """Fails on an end tag that closes nothing open, or the wrong thing."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)


@pytest.mark.parametrize("records", [RECORDS, RECORDS[:1], []], ids=["many", "one", "none"])
def test_page_is_whole_and_needs_nothing_else(records: list[RequestRecord]) -> None:
    page = page_of(records)
    balance = Balance()
    balance.feed(page)
    assert balance.open == []
    assert not {"script", "link", "img", "iframe"} & balance.tags
    assert not re.search(r"(src|href)=|url\(|@import", page)
    assert len(re.findall(r"<svg ", page)) == 6


def test_page_tells_figures_intervals_failures_and_warnings() -> None:
    page = page_of(RECORDS)
    assert "<td>3.00</td><td>2.5 to 3.5</td>" in page
    assert "<td>500.00<small>490 to 510</small></td><td>-<small></small></td>" in page
    assert "Failures: 2 x timeout" in page
    assert "the client was late" in page
    assert "steal_percent: 1.235" in page
    assert "goodput" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_plots_hold_the_points_at_their_places() -> None:
    plot = line_plot(
        [Series(name="a & b", points=[(0.0, 0.0), (10.0, 50.0)])], x_label="x", y_label="y"
    )
    assert re.findall(r'<polyline [^>]*points="([^"]*)"', plot) == ["64.0,220.0 624.0,12.0"]
    assert "a &amp; b" in plot


def test_stretches_hold_what_came_and_what_waited_in_them() -> None:
    """Two seconds: 2 tokens, then 2; the request of the second waited 0.4 s."""
    records = [make_record([0.25, 0.5, 1.0]), make_record([2.0], index=1, origin_s=1.6)]
    (first, rate, wait), (second, late_rate, late_wait) = _slices(records, 0.0)
    assert (first, second) == (0.5, 1.5)
    assert (rate, late_rate) == (2.0, 2.0)  # the token at 1.0 s belongs to the second stretch
    assert (wait, late_wait) == (pytest.approx(250.0), pytest.approx(400.0))


def test_server_is_drawn_where_it_told_something() -> None:
    timeline = [[0.0, 1.0, 0.0, 0.25], [1.0, 2.0, None, 0.5]]
    told = {"num_requests_waiting": {"mean": 0.0, "max": 0.0}, "timeline": timeline}
    page = load_page(RESULT | {"server_metrics": told}, RECORDS, [], start_s=0.0)
    assert len(re.findall(r"<svg ", page)) == 8
    assert "server: queue" in page


@pytest.mark.parametrize(
    ("most", "ticks"),
    [
        (10.0, [0, 2, 4, 6, 8, 10]),
        (0.7, [0, 0.2, 0.4, 0.6]),
        (0.0, [0, 1]),
        (2600, [0, 1000, 2000]),
    ],
)
def test_ticks_are_round(most: float, ticks: list[float]) -> None:
    assert tick_values(most) == pytest.approx(ticks)


def test_long_runs_make_no_long_page() -> None:
    """And the one long gap among a hundred thousand is still there."""
    times = [0.001 * n for n in range(100_000)]
    stalled = [time if time < 50 else time + 2.0 for time in times]
    page = page_of([make_record(stalled, tokens=100_000)])
    assert len(page) < 100_000
    dots = re.findall(r'class="dots s0" d="([^"]*)"', page)[0]
    assert dots.count("M") <= NUM_POINTS
    heights = [float(y) for y in re.findall(r"M[\d.]+ ([\d.]+)h0", dots)]
    assert min(heights) == pytest.approx(12.0, abs=1.0)  # 2,000 ms, at the plot's top
