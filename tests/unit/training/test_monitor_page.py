"""The page and its charts: whole, self-contained, and true to the figures."""

from __future__ import annotations

import re

import pytest

from llmserve.training.monitor_chart import Series, line_chart
from llmserve.training.monitor_diagnosis import Finding
from llmserve.training.monitor_page import render_page

LINES = [
    {
        "step": step,
        "loss": 5 / step,
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "tokens_per_s": 1000.0,
        "mfu": 0.25,
        "grad_norms": {"layer 0": 0.1, "output": 0.2},
        "update_ratios": {"layer 0": 1e-3, "output": 2e-3},
    }
    for step in (10, 20)
] + [{"step": 20, "held_out_loss": 2.5, "dead_units": {"layer 0": 0.125}}]


def points(svg: str) -> list[list[tuple[float, float]]]:
    return [
        [tuple(map(float, pair.split(","))) for pair in line.split()]  # type: ignore[misc]
        for line in re.findall(r'<polyline points="([^"]*)"', svg)
    ]


def test_page_holds_figures_words_and_a_chart_of_each_kind() -> None:
    page = render_page("a <run>", LINES, [Finding("warning", "x < y & z")])
    assert "a &lt;run&gt;" in page
    assert "x &lt; y &amp; z" in page
    assert "2.5000" in page
    assert "25.0%" in page
    assert page.count("<svg") == 8
    assert "prefers-color-scheme: dark" in page


def test_page_needs_nothing_from_elsewhere() -> None:
    page = render_page("run", LINES, [])
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page
    assert "src=" not in page


def test_empty_log_is_a_page_too() -> None:
    assert "nothing measured yet" in render_page("run", [], [])


def test_line_goes_through_its_points() -> None:
    svg = line_chart([Series(label="a", points=[(0, 0), (5, 10), (10, 20)], color="red")], unit="u")
    ((x0, y0), (x1, y1), (x2, y2)) = points(svg)[0]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2)
    assert y0 > y1  # larger is higher


def test_logarithmic_line_has_equal_steps_for_equal_factors() -> None:
    series = Series(label="a", points=[(1, 0.01), (2, 1), (3, 100), (4, 0)], color="red")
    ((_, y0), (_, y1), (_, y2)) = points(line_chart([series], unit="u", is_log=True))[0]
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2)


def test_long_line_is_thinned_to_means() -> None:
    series = Series(label="a", points=[(x, x % 2) for x in range(10_000)], color="red")
    (line,) = points(line_chart([series], unit="u"))
    assert len(line) <= 300
    assert len({y for _, y in line}) == 1


@pytest.mark.parametrize("value", [0.0, -3.0, 5.0])
def test_single_or_constant_values_are_drawn(value: float) -> None:
    for xs in ([1], [1, 2]):
        svg = line_chart(
            [Series(label="a", points=[(x, value) for x in xs], color="red")], unit="u"
        )
        assert len(re.findall(r"<circle", svg)) == (1 if len(xs) == 1 else 0)
        assert "nan" not in svg


def test_legend_of_many_grades_names_the_ends() -> None:
    many = [Series(label=f"layer {n}", points=[(1, n), (2, n)], color="red") for n in range(12)]
    legend = line_chart(many, unit="u", is_graded=True).split('<p class="legend">')[1]
    assert "layer 0" in legend
    assert "layer 11" in legend
    assert "10 between" in legend
    assert "layer 5" in line_chart(many, unit="u").split('<p class="legend">')[1]
