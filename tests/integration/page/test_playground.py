"""The playground in a real browser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from llmserve.server.auth import Key, KeyRing, RouteScope
from support.browser import answer_with, opened, run_prompt
from support.servers import local_server

playwright = pytest.importorskip("playwright.sync_api")

pytestmark = pytest.mark.http


PAYLOAD = "<img src=x onerror=document.title='run'><script>document.title='run'</script> & \u2028"


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


def test_nothing_to_send_is_said_and_a_prompt_is_kept_for_two_sides(
    folder: Path, page: Any
) -> None:
    with opened(page, folder):
        sent: list[Any] = []
        page.on("request", lambda made: made.method == "POST" and sent.append(made))
        page.evaluate(
            """() => { const prompt = document.getElementById("prompt");
                       prompt.addEventListener("invalid", () => (prompt.dataset.told =
                         prompt.validationMessage)); }"""
        )
        page.click("#run")
        assert page.get_attribute("#prompt", "data-told") == "Write the beginning of a text first."
        assert sent == []
        page.locator(".more summary").first.click()
        page.check("#setting-ignore_eos")
        page.fill("#setting-max_tokens", "3")
        run_prompt(page, "Once")
        assert page.input_value("#prompt") == ""
        page.check("#compare")
        assert page.input_value("#prompt") == "Once"
