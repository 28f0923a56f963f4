"""The page in a real browser. Skipped where there is no playwright or no Chromium of the system."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmserve.runners.protocol import SamplingRow
from llmserve.server.auth import Key, KeyRing, RouteScope
from llmserve.text.tokenizer import Tokenizer
from support.models import make_model_folder
from support.servers import local_server

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
    assert not [text for text in complaints if "401" not in text]


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
