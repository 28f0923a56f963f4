"""The dashboard in a real browser: counters, percentiles, the map of the KV blocks."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmserve.server.auth import Key, KeyRing, RouteScope
from support.browser import opened
from support.servers import call, local_server

playwright = pytest.importorskip("playwright.sync_api")

pytestmark = pytest.mark.http


def test_the_dashboard_shows_what_the_counters_say(folder: Path, page: Any) -> None:
    with opened(page, folder, "#dashboard") as server:
        server.complete(prompt="Once upon a time", max_tokens=9, n=2)
        totals = page.locator("#totals")
        playwright.expect(totals).to_contain_text(re.compile(r"generated tokens\s*18(?!\d)"))
        playwright.expect(totals).to_contain_text(re.compile(r"ended: length\s*2(?!\d)"))
        first = page.locator("#cards article", has_text="Time to first token")
        playwright.expect(first.locator("strong")).to_have_text(re.compile(r"\d m?s"))
        assert page.is_hidden("#dashboard-problem")


def canvas_colours(page: Any) -> set[str]:
    """Colours at the centres of the map's cells."""
    return set(
        page.evaluate(
            """() => {
              const figure = document.querySelector("#blocks figure");
              const canvas = figure.querySelector("canvas");
              const context = canvas.getContext("2d");
              const scale = canvas.width / canvas.clientWidth;
              return figure.cells.map((_what, index) => {
                const x = ((index % figure.columns) + 0.4) * figure.size * scale;
                const y = (Math.floor(index / figure.columns) + 0.4) * figure.size * scale;
                return [...context.getImageData(x, y, 1, 1).data].join(",");
              });
            }"""
        )
    )


def test_the_map_shows_who_holds_which_blocks(folder: Path, page: Any) -> None:
    with opened(page, folder, "#dashboard", step_s=0.05) as server:
        server.complete(prompt=list(range(5, 40)), max_tokens=1)
        bodies = (
            json.dumps({"prompt": prompt, "max_tokens": 200, "ignore_eos": True}).encode()
            for prompt in (list(range(5, 40)), [9])
        )
        waiting = [
            asyncio.run_coroutine_threadsafe(
                call(server.app, "POST", "/v1/completions", body), server.loop
            )
            for body in bodies
        ]
        text = page.locator("#blocks .blocks-under")
        playwright.expect(text).to_contain_text("2 requests hold")
        server.loop.call_soon_threadsafe(server.engine.running.clear)
        page.wait_for_timeout(1500)  # it is drawn anew every second
        told = server.get("/kv-blocks").json()["models"][0]["replicas"][0][0]
        figure = page.evaluate("() => document.querySelector('#blocks figure').cells")
        assert figure == [what for what, count in told["runs"] for _ in range(count)]
        assert len(told["owners"]) == 2
        holders = page.locator("#blocks [data-id]")
        assert holders.count() == 2
        many = canvas_colours(page)
        holders.first.focus()
        page.keyboard.press("Enter")  # one request's blocks stand out, the rest grows faint
        playwright.expect(holders.first).to_have_attribute("aria-pressed", "true")
        assert canvas_colours(page) != many
        page.wait_for_timeout(1200)
        playwright.expect(page.locator(":focus")).to_have_attribute("aria-pressed", "true")
        server.loop.call_soon_threadsafe(server.engine.running.set)
        for one in waiting:
            assert one.result(30).status == 200


@pytest.mark.parametrize("num_blocks", [10, 1000, 10_000])
def test_a_map_of_any_size_can_be_read_on_a_narrow_screen(
    folder: Path, page: Any, num_blocks: int
) -> None:
    runs = [[3 + index % 40, 1] for index in range(num_blocks // 2)]
    runs.append([0, num_blocks - len(runs)])
    pool = {
        "window": None, "num_blocks": num_blocks, "blocks_per_cell": 1, "runs": runs,
        "owners": [f"{index:032x}" for index in range(min(40, num_blocks // 2))],
    }  # fmt: skip
    page.route(
        "**/kv-blocks",
        lambda route: route.fulfill(
            json={"models": [{"model": "tiny", "block_size": 16, "replicas": [[pool]]}]}
        ),
    )
    page.set_viewport_size({"width": 390, "height": 844})
    with opened(page, folder, "#dashboard"):
        playwright.expect(page.locator("#blocks .blocks-under")).to_contain_text("blocks of 16")
        figure = page.evaluate(
            """() => { const { size, columns, cells } = document.querySelector("#blocks figure");
                       return [size, columns, cells.length]; }"""
        )
        size, columns, cells = figure
        assert cells == num_blocks
        assert 3 <= size <= 18
        assert size * columns <= 390
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.locator("#blocks [data-id]").count() <= 12


def test_the_dashboard_tells_a_key_that_does_not_open_the_counters(folder: Path, page: Any) -> None:
    keys = KeyRing([Key.of("the-right-key", {RouteScope.USER})])
    with local_server(folder, keys=keys) as server, server.listening() as (host, port):
        page.goto(f"http://{host}:{port}/#dashboard")
        page.fill("#key", "the-right-key")
        page.keyboard.press("Enter")
        page.wait_for_selector("#status[data-kind=ok]")
        playwright.expect(page.locator("#dashboard-problem")).to_contain_text(
            "metrics or admin key"
        )
        assert page.is_hidden("#view-playground")


def test_percentiles_lie_in_the_bucket_of_the_true_ones(folder: Path, page: Any) -> None:
    values = np.random.default_rng(5).lognormal(-3.0, 1.2, 500)
    bounds = np.array([0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0])
    counts = [(str(bound), int((values <= bound).sum())) for bound in bounds] + [("+Inf", 500)]
    text = "\n".join(f'llmserve_x_bucket{{le="{bound}"}} {count}.0' for bound, count in counts)
    with opened(page, folder):
        found = page.evaluate(
            """async ([text, shares]) => {
              const { bucketsBetween, parse, quantile } = await import("/static/metrics.js");
              const buckets = bucketsBetween(null, parse(text), "x");
              return shares.map((share) => quantile(buckets, share));
            }""",
            [text, [0.5, 0.95, 0.99]],
        )
    true = np.quantile(values, [0.5, 0.95, 0.99], method="inverted_cdf")
    assert np.array_equal(np.searchsorted(bounds, found), np.searchsorted(bounds, true))
