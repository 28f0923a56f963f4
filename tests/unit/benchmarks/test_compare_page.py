"""Two runs over time: what was due, what was in time, and the page that shows it."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from llmserve.benchmarks.compare_page import (
    compare_page,
    goodput_plot,
    span_of,
    timeline_of,
)
from llmserve.benchmarks.plots import standalone
from llmserve.errors import ConfigError

SLOS = {"ttft": 500.0, "tpot": 50.0}


def run(*requests: tuple[float, float, float, int, str]) -> dict[str, Any]:
    """A detailed result of (due, ttft, latency, output tokens, error)."""
    names = ("start_times", "ttfts", "latencies", "output_lens", "errors")
    return dict(zip(names, map(list, zip(*requests, strict=True)), strict=True))


RUN = run(
    (0.0, 0.4, 0.8, 9, ""),  # in time: 0.05 s a token
    (0.5, 0.6, 0.7, 9, ""),  # first token late
    (1.0, 0.1, 1.0, 10, ""),  # 0.1 s a token
    (1.5, 0.0, 0.0, 0, "timeout"),
    (3.0, 0.2, 0.2, 1, ""),  # one token has no time per token
)


def test_requests_count_where_they_were_due() -> None:
    assert span_of([RUN, run((4.0, 0.1, 0.1, 1, ""))]) == 4.0
    timeline = timeline_of(RUN, SLOS, span_s=3.0)
    assert timeline.stretch_s == 1.0
    assert timeline.due == [2.0, 2.0, 1.0]
    assert timeline.good == [1.0, 0.0, 1.0]
    assert timeline.attained == pytest.approx(2 / 5)
    assert timeline.ttft_ms == pytest.approx([500.0, 100.0, 200.0])
    assert timeline.tpot_ms[:2] == pytest.approx([31.25, 100.0])
    assert timeline.tpot_ms[2] is None
    assert timeline.series("A", timeline.tpot_ms).points == [
        (0.5, pytest.approx(31.25)),
        (1.5, pytest.approx(100.0)),
    ]


def test_without_objectives_what_succeeds_is_in_time() -> None:
    assert timeline_of(RUN, {}, span_s=3.0).attained == pytest.approx(4 / 5)


def test_result_without_details_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="--save-detailed"):
        timeline_of({"completed": 5}, SLOS, span_s=1.0)


def test_page_shows_both_and_escapes_their_names() -> None:
    timelines = [timeline_of(RUN, SLOS, span_s=3.0)] * 2
    page = compare_page(["<ours>", "theirs"], timelines, SLOS, {"mean_ttft_ms": "B is slower"})
    assert "<ours>" not in page
    assert "A is &lt;ours&gt;: 40.0% of the requests in time" in page
    assert "ttft 500 ms, tpot 50 ms" in page
    assert "<th>mean_ttft_ms</th><td>B is slower</td>" in page
    assert page.count("<svg") == 3
    assert "<script" not in page


def test_plot_is_a_file_of_its_own() -> None:
    timeline = timeline_of(RUN, SLOS, span_s=3.0)
    plot = standalone(goodput_plot(["a", "b"], [timeline, timeline]))
    root = ElementTree.fromstring(plot)  # noqa: S314 - it is our own
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) == 3
