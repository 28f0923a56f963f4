"""Rounds under a budget, exact prompts, servers that are started, waited for and stopped."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llmserve.benchmarks.offline_contenders import OfflineOptions
from llmserve.benchmarks.peer_servers import PeerServer, llama_server, servers_of
from llmserve.benchmarks.peers import Budget
from llmserve.benchmarks.peers_http import HttpLoad, exact_prompts, round_prompts, rows_for
from llmserve.errors import ConfigError, EngineError
from llmserve.text.tokenizer import Tokenizer

HEALTHY = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def server(code: str) -> PeerServer:
    return PeerServer(
        scheme="int4",
        engine="a peer",
        weights="int4",
        cache="f16",
        versions={},
        command=(sys.executable, "-c", code, "{port}"),
        environment=dict(os.environ),
    )


def test_budget_lets_a_round_begin_only_if_the_longest_so_far_would_end_in_time() -> None:
    times: Iterator[float] = iter([0.0, 5.0, 15.0, 40.0, 60.0])  # made, then before each round
    budget = Budget(70.0, clock=lambda: next(times))
    assert [budget.has_room() for _ in range(4)] == [True, True, True, False]


def test_first_round_is_taken_whatever_the_budget() -> None:
    times: Iterator[float] = iter([0.0, 9.0, 10.0])
    budget = Budget(1e-9, clock=lambda: next(times))
    assert [budget.has_room(), budget.has_room()] == [True, False]


def test_server_is_waited_for_and_nothing_of_it_stays(tmp_path: Path) -> None:
    with open(tmp_path / "log", "wb") as log:
        with server(HEALTHY).start(log) as running:
            assert running.wait() > 0
            assert running.resident_bytes() is None or running.resident_bytes() > 1 << 20
            pid = running._process.pid
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_server_that_ends_is_an_error_with_its_last_line(tmp_path: Path) -> None:
    code = "print('loading'); print('no such model'); raise SystemExit(3)"
    with (
        open(tmp_path / "log", "wb") as log,
        server(code).start(log) as running,
        pytest.raises(EngineError, match="no such model"),
    ):
        running.wait()


def test_prompts_are_exactly_as_long_as_asked_and_none_comes_twice() -> None:
    words = [f"{chr(97 + i % 26)}{chr(97 + i // 26)} " * 20 for i in range(300)]
    tokenizer = Tokenizer.train("bpe", words, vocab_size=400)
    rng = np.random.default_rng(0)
    load = HttpLoad(requests={1: 2, 4: 5}, input_len=24, output_len=8)
    prompts = round_prompts(tokenizer, load, rng)
    assert {count: len(made) for count, made in prompts.items()} == {1: 3, 4: 6}
    texts = [str(prompt.content) for made in prompts.values() for prompt in made]
    assert len(set(texts)) == len(texts)
    assert {len(tokenizer.encode(text, add_special_tokens=False)) for text in texts} == {24}
    assert exact_prompts(tokenizer, 2, 24, np.random.default_rng(0))[0].content == texts[0]


def test_ours_is_started_as_it_is_and_peers_only_where_named(tmp_path: Path) -> None:
    for name in ("m", "m-int4"):
        (tmp_path / name).mkdir()
    options = OfflineOptions(model=tmp_path / "m", schemes=("int4",))
    [row] = rows_for(servers_of(options, slots=4, request_len=10))
    assert row.server.is_ours
    assert row.server.command[1:] == (
        *("-m", "llmserve", "serve", str(tmp_path / "m-int4")),
        *("--port", "{port}"),
    )


def test_missing_program_or_form_is_named(tmp_path: Path) -> None:
    options = OfflineOptions(model=tmp_path / "m", schemes=("int4",))
    with pytest.raises(ConfigError, match="llama-server"):
        llama_server(options, tmp_path, "int4", slots=1, request_len=8)
    with pytest.raises(ConfigError, match="llmserve quantize"):
        list(servers_of(options, slots=1, request_len=8))
