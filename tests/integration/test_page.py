"""The page in a real browser. Skipped where there is no playwright or no Chromium of the system."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmserve.runners.protocol import SamplingRow
from llmserve.server.auth import Key, KeyRing, RouteScope
from llmserve.text.tokenizer import Tokenizer
from support.models import make_model_folder
from support.servers import call, local_server

playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
PAYLOAD = "<img src=x onerror=document.title='run'><script>document.title='run'</script> & \u2028"

pytestmark = [
    pytest.mark.http,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no browser at {CHROMIUM}"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that must not complain: no script error, nothing the policy had to stop."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    opened = context.new_page()
    complaints: list[str] = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on(
        "console", lambda message: complaints.append(message.text) if message.type == "error" else 0
    )
    yield opened
    context.close()
    assert not [text for text in complaints if "status of 4" not in text]


def answer_with(text: str, folder: Path) -> Any:
    ids = Tokenizer.load(folder).encode(text, add_special_tokens=False)

    def script(row: SamplingRow) -> int:
        made = len(row.token_ids) - row.num_prompt_tokens
        return ids[made] if made < len(ids) else 0

    return script


def test_the_playground_streams_and_shows_payloads_as_text(folder: Path, page: Any) -> None:
    with (
        local_server(folder, script=answer_with(PAYLOAD, folder)) as server,
        server.listening() as (host, port),
    ):
        page.goto(f"http://{host}:{port}/")
        page.wait_for_selector("#status[data-kind=ok]")
        assert page.inner_text("#model") == "tiny"
        page.fill("#prompt", "<b>Once</b>")
        page.keyboard.press("Control+Enter")
        playwright.expect(page.locator("#figures")).to_contain_text("stop")
        assert page.text_content("#output") == "<b>Once</b>" + PAYLOAD
        assert "first token" in page.inner_text("#figures")
        page.click("#tab-chat")
        assert page.text_content("#output") == ""
        page.fill("#prompt", "hello")
        page.click("#run")
        playwright.expect(page.locator("#figures")).to_contain_text("stop")
        assert page.text_content(".turn.user p") == "hello"
        assert page.text_content(".turn.assistant p") == PAYLOAD
        assert page.title() == "tiny · llmserve"
        assert page.locator("#output img, #output script, #output b").count() == 0


def test_escape_stops_the_request_on_the_server_too(folder: Path, page: Any) -> None:
    # A text of its own: the seed is the page's, and a drawn one may end at any token.
    script = answer_with("Once upon a time there was a dog. " * 20, folder)
    with (
        local_server(folder, script=script, step_s=0.02) as server,
        server.listening() as (host, port),
    ):
        page.goto(f"http://{host}:{port}/")
        page.wait_for_selector("#status[data-kind=ok]")
        page.fill("#prompt", "Once")
        page.click("#run")
        page.wait_for_selector("#stop:not([hidden])")
        playwright.expect(page.locator(".made")).to_have_text(re.compile(".{6}", re.DOTALL))
        page.keyboard.press("Escape")
        page.wait_for_selector("#run:not([hidden])")
        assert "stopped" in page.inner_text("#figures")
        server.wait_idle()
        assert server.service.metrics._ended["abort"] == 1


def test_a_key_is_asked_for_and_errors_are_shown(folder: Path, page: Any) -> None:
    keys = KeyRing([Key.of("the-right-key", {RouteScope.USER})])
    with local_server(folder, keys=keys) as server, server.listening() as (host, port):
        page.goto(f"http://{host}:{port}/")
        page.wait_for_selector("#status[data-kind=bad]")
        page.fill("#key", "the-right-key")
        page.keyboard.press("Enter")
        page.wait_for_selector("#status[data-kind=ok]")
        assert page.evaluate("Object.keys(localStorage).length + document.cookie.length") == 0
        page.fill("#setting-seed", "not a number")
        page.fill("#prompt", "x")
        page.click("#run")
        assert "whole number" in page.inner_text(".error")


@contextmanager
def opened(page: Any, folder: Path, view: str = "", **options: Any) -> Iterator[Any]:
    """A server, with the page open at one of its views."""
    with local_server(folder, **options) as server, server.listening() as (host, port):
        page.goto(f"http://{host}:{port}/{view}")
        page.wait_for_selector("#status[data-kind=ok]")
        yield server


def run_prompt(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.click("#run")
    playwright.expect(page.locator("#figures")).to_contain_text("length")
    page.wait_for_selector("#run:not([hidden])")


@pytest.mark.parametrize("kind", ["complete", "chat"])
def test_tokens_show_their_probabilities_by_keyboard(folder: Path, page: Any, kind: str) -> None:
    with opened(page, folder, script=answer_with("Once there was", folder)) as server:
        page.click(f"#tab-{kind}")
        page.check("#probabilities")
        page.fill("#setting-max_tokens", "6")
        page.click(".more summary >> nth=0")
        page.check("#setting-ignore_eos")
        run_prompt(page, "Once")
        tokens = page.locator("#output .token")
        asked = {"prompt": "Once", "max_tokens": 6, "ignore_eos": True, "logprobs": 5}
        logprobs = server.post("/v1/completions", asked).json()["choices"][0]["logprobs"]
        assert tokens.count() <= len(logprobs["tokens"])
        tokens.first.focus()
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement === document.querySelectorAll('.token')[1]")
        told = page.locator("#alternatives li")
        assert told.count() >= len(logprobs["top_logprobs"][1])
        assert page.locator("#alternatives [aria-current]").count() >= 1
        page.keyboard.press("Escape")
        assert page.is_hidden("#alternatives")


def test_side_by_side_is_one_seed_and_two_settings(folder: Path, page: Any) -> None:
    with opened(page, folder):
        sent: list[dict[str, Any]] = []
        page.on("request", lambda made: made.method == "POST" and sent.append(made.post_data_json))
        page.check("#compare")
        for summary in page.locator(".more summary").all():
            summary.click()
        for side in ("", "b-"):
            page.fill(f"#setting-{side}max_tokens", "12")
            page.check(f"#setting-{side}ignore_eos")
        run_prompt(page, "Once")
        first, second = sent
        assert first == second
        assert first["seed"] is not None
        assert page.text_content("#output") == page.text_content("#output-b") != "Once"
        assert str(first["seed"]) in page.inner_text("#seed-used")
        page.fill("#setting-b-temperature", "1.5")
        page.fill("#setting-b-logit_bias", "5: -2.5, 6: 1")
        sent.clear()
        run_prompt(page, "Once")
        first, second = sorted(sent, key=lambda body: body["temperature"])
        assert first["seed"] == second["seed"]
        assert second["temperature"] == 1.5
        assert second["logit_bias"] == {"5": -2.5, "6": 1}
        assert "logit_bias" not in first


def test_settings_that_cannot_be_meant_are_refused(folder: Path, page: Any) -> None:
    with opened(page, folder):
        page.locator(".more summary").first.click()
        page.evaluate("document.getElementById('form').noValidate = true")
        for name, text, message in (
            ("stop_token_ids", "two", "whole numbers"),
            ("logit_bias", "5", "pairs"),
            ("temperature", "", "must be a number"),
            ("top_p", "7", "top_p"),  # this one is the server's refusal
        ):
            field = page.locator(f"#setting-{name}")
            before = field.input_value()
            field.fill(text)
            page.fill("#prompt", "Once")
            page.click("#run")
            playwright.expect(page.locator("#output .error")).to_contain_text(message)
            page.wait_for_selector("#run:not([hidden])")
            assert page.input_value("#prompt") == "Once"
            field.fill(before)


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


def test_the_model_card_shows_a_certificate_where_there_is_one(folder: Path, page: Any) -> None:
    certificate = {
        "source_perplexity": 3.25,
        "forms": [{"executed_form": "int8 <b>", "mean_kl": 0.00123, "scatter": [[1, 2]] * 20}],
    }

    def with_certificate(route: Any) -> None:
        reply = route.fetch()
        body = json.dumps({**reply.json(), "certificate": certificate, "lineage": None})
        route.fulfill(response=reply, body=body)

    page.route("**/v1/models/tiny", with_certificate)
    with opened(page, folder, "#model"):
        card = page.inner_text("#models")
        assert "fake" in card
        assert "3.25" in card
        assert "Lineage" not in card
        page.click("#models summary")
        assert page.inner_text("#models td >> nth=0") == "int8 <b>"
        assert page.inner_text("#models td >> nth=1") == "0.00123"
        page.click("#nav-playground")
        assert page.is_visible("#prompt")
        assert page.get_attribute("#nav-playground", "aria-current") == "page"


def test_the_model_card_draws_the_curves_of_its_training(folder: Path, page: Any) -> None:
    training = {
        "loss": [[10 * step, 2 + 3 / step] for step in range(1, 60)],
        "held_out_loss": [[100, 3.1], [590, 2.25]],
    }

    def with_training(route: Any) -> None:
        reply = route.fetch()
        route.fulfill(response=reply, body=json.dumps({**reply.json(), "training": training}))

    page.route("**/v1/models/tiny", with_training)
    with opened(page, folder, "#model"):
        picture = page.locator("#models svg.curves")
        assert "held out loss from 3.100 at step 100 to 2.250 at step 590" in str(
            picture.get_attribute("aria-label")
        )
        line = str(page.get_attribute("#models polyline.curve-0", "points")).split()
        assert len(line) == 59
        heights = [float(point.split(",")[1]) for point in line]
        assert heights == sorted(heights)  # the loss falls: lines go down the page
        assert page.locator("#models circle").count() == 2
        assert "training: 2.051 at the end" in page.inner_text("#models .curve-legend")


UNNAMED = """() => [...document.querySelectorAll("input, select, textarea, button, meter")]
  .filter((node) => !(node.labels?.length || node.ariaLabel || node.textContent.trim()))
  .map((node) => node.outerHTML)"""

COLOURS = """() => {
  const names = "ground sheet ink faint accent on-accent made bad".split(" ");
  const style = getComputedStyle(document.documentElement);
  return names.map((name) => [`--${name}`, style.getPropertyValue(`--${name}`)]);
}"""


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(colour.strip()[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_control_has_a_name_and_every_text_contrast(folder: Path, page: Any) -> None:
    with opened(page, folder):
        assert page.evaluate(UNNAMED) == []
        for theme in ("light", "dark"):
            page.evaluate("theme => (document.documentElement.dataset.theme = theme)", theme)
            light = {name: luminance(colour) for name, colour in page.evaluate(COLOURS)}
            for text, ground in (
                ("--ink", "--ground"), ("--ink", "--sheet"), ("--ink", "--made"),
                ("--faint", "--ground"), ("--faint", "--sheet"), ("--bad", "--sheet"),
                ("--on-accent", "--accent"), ("--accent", "--ground"),
            ):  # fmt: skip
                low, high = sorted((light[text], light[ground]))
                assert (high + 0.05) / (low + 0.05) >= 4.5, f"{text} on {ground}, {theme}"
