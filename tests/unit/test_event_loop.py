"""Which event loop is taken."""

from __future__ import annotations

import asyncio

import pytest

from llmserve import event_loop


async def name_of_loop() -> str:
    await asyncio.sleep(0)
    return type(asyncio.get_running_loop()).__module__.partition(".")[0]


def test_it_is_uvloop_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert event_loop.run_loop(name_of_loop()) == "uvloop"
    monkeypatch.setattr(event_loop, "find_spec", lambda name: None)
    assert event_loop.run_loop(name_of_loop()) == "asyncio"
