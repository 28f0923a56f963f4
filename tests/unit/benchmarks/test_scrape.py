from __future__ import annotations

import asyncio

import pytest

from llmserve.benchmarks.scrape import Scraper, parse_metrics
from llmserve.errors import LLMServeError

OURS = """# HELP llmserve_num_requests_waiting Sequences waiting.
# TYPE llmserve_num_requests_waiting gauge
llmserve_num_requests_waiting %d
llmserve_kv_cache_usage_perc %s
llmserve_prefix_cache_queries_total %d
llmserve_prefix_cache_hits_total 50.0
"""


def test_names_of_three_servers_are_known() -> None:
    assert parse_metrics(OURS % (3, "0.5", 100))["num_requests_waiting"] == 3.0
    labels = '{engine="%s",model_name="a b}"}'
    vllm = "\n".join(
        f"vllm:{name}{labels % engine} {value}"
        for engine, value in ((0, 0.25), (1, 0.75))
        for name in ("kv_cache_usage_perc", "num_requests_running")
    )
    assert parse_metrics(vllm) == {"kv_cache_usage_perc": 0.75, "num_requests_running": 1.0}
    llama = "llamacpp:requests_deferred 4\nllamacpp:tokens_predicted_total 7 1700000000\n"
    assert parse_metrics(llama) == {"num_requests_waiting": 4.0, "generation_tokens": 7.0}
    assert parse_metrics("<html>\nother_metric 3\nvllm:num_requests_running x\n") == {}


def test_report_holds_means_peaks_and_what_was_added() -> None:
    """Gauges leave out the looks before and after the load."""
    loads = [(0, "0.1", 100), (8, "0.5", 150), (1, "0.3", 180), (0, "0.1", 200)]
    pages = iter([OURS % load for load in loads])
    times = iter([10.0, 11.0, 12.5, 13.0])

    async def fetch() -> bytes:
        return next(pages).encode()

    scraper = Scraper(fetch, clock=lambda: next(times))

    async def look_often() -> None:
        for _ in loads:
            await scraper.look()

    asyncio.run(look_often())
    report = scraper.report(10.5)
    assert report is not None
    assert report["num_looks"] == 4
    assert report["num_requests_waiting"] == {"mean": 4.5, "max": 8.0}
    assert report["kv_cache_usage_perc"] == {"mean": pytest.approx(0.4), "max": 0.5}
    assert report["prefix_cache_queries"] == 100.0
    assert report["prefix_cache_hit_rate"] == 0.0
    assert report["timeline"] == [
        [-0.5, None, 0.0, 0.1], [0.5, None, 8.0, 0.5], [2.0, None, 1.0, 0.3],
        [2.5, None, 0.0, 0.1],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("page", "note"), [(None, "HTTP 404"), (b"hello", "holds none of the names")]
)
def test_server_without_metrics_is_one_note(page: bytes | None, note: str) -> None:
    async def fetch() -> bytes:
        if page is None:
            raise LLMServeError("http://h/metrics: HTTP 404")
        return page

    scraper = Scraper(fetch)

    async def look_and_run() -> None:
        await scraper.look()
        await scraper.run()  # ends at once: nobody asks such a server again

    asyncio.run(look_and_run())
    assert scraper.report(0.0) is None
    assert note in scraper.note
