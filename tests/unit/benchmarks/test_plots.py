"""Drawings: names of points that lie at one height are not written over each other."""

from __future__ import annotations

import itertools
import re

from llmserve.benchmarks.plots import LINE, Dot, dot_plot


def test_names_of_neighbours_stand_above_each_other() -> None:
    dots = [Dot(x=1.0 + 0.01 * n, y=0.0, label=f"name {n}") for n in range(4)]
    plot = dot_plot([*dots, Dot(x=2.0, y=9.0, label="<high>")], x_label="MB", y_label="nats")
    heights = [float(y) for y in re.findall(r'y="([\d.]+)">name', plot)]
    assert len(heights) == 4
    assert all(low - high >= LINE for low, high in itertools.pairwise(heights))
    assert "&lt;high&gt;" in plot
