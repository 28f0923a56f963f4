"""Servers that are started, waited for and stopped."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llmserve.benchmarks.running_server import PeerServer
from llmserve.errors import EngineError

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


def test_server_that_does_not_answer_in_its_time_is_an_error(tmp_path: Path) -> None:
    silent = replace(server("import time; time.sleep(60)"), ready_timeout_s=0.05)
    with (
        open(tmp_path / "log", "wb") as log,
        silent.start(log) as running,
        pytest.raises(EngineError, match=r"not ready after 0\.05 s: it printed nothing"),
    ):
        running.wait()
