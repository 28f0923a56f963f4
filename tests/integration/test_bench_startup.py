"""`llmserve bench startup` on a small model, and on a server that does not start."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmserve.benchmarks.client import ServerError
from llmserve.benchmarks.startup import StartupOptions, installed_bytes, measure_startup
from support.models import make_model_folder

pytestmark = pytest.mark.http


def test_start_is_measured_to_the_first_token(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    start = measure_startup(StartupOptions(model=folder, repeats=1))
    assert 0 < start.listening_s < start.first_token_s
    if start.resident_bytes is not None and start.proportional_bytes is not None:
        assert 10 << 20 < start.proportional_bytes <= start.resident_bytes


def test_server_that_ends_is_told_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"the server ended \(\d+\): .*none"):
        measure_startup(StartupOptions(model=tmp_path / "none", repeats=1))


def test_packages_count_with_what_they_need() -> None:
    sizes = installed_bytes("aiohttp")
    assert sizes["aiohttp"] > 1 << 20
    assert "yarl" in sizes
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    assert installed_bytes("no-such-package-anywhere") == {}
