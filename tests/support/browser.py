"""What tests of the page share: where the browser is, and a server with the page open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmserve.runners.protocol import SamplingRow
from llmserve.text.tokenizer import Tokenizer
from support.servers import local_server

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


def answer_with(text: str, folder: Path) -> Any:
    """A script that answers with `text`."""
    ids = Tokenizer.load(folder).encode(text, add_special_tokens=False)

    def script(row: SamplingRow) -> int:
        made = len(row.token_ids) - row.num_prompt_tokens
        return ids[made] if made < len(ids) else 0

    return script


@contextmanager
def opened(page: Any, folder: Path, view: str = "", **options: Any) -> Iterator[Any]:
    """A server, with the page open at one of its views."""
    with local_server(folder, **options) as server, server.listening() as (host, port):
        page.goto(f"http://{host}:{port}/{view}")
        page.wait_for_selector("#status[data-kind=ok]")
        yield server


def run_prompt(page: Any, text: str) -> None:
    """Have a text gone on with, to its end by length."""
    from playwright.sync_api import expect

    page.fill("#prompt", text)
    page.click("#run")
    expect(page.locator("#figures")).to_contain_text("length")
    page.wait_for_selector("#run:not([hidden])")
