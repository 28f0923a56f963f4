"""llama.cpp's server on a file, for tests that have one; built elsewhere, named by a variable."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "LLMSERVE_LLAMA_CPP"

Post = Callable[[str, dict[str, Any]], dict[str, Any]]


@contextmanager
def llama_server(gguf: Path) -> Iterator[Post]:
    """A running server; the function sends JSON to one of its routes. Skips where there is none."""
    program = Path(os.environ.get(VARIABLE, "")) / "llama-server"
    if not program.is_file():
        pytest.skip(f"no llama.cpp: set {VARIABLE} to the folder of its programs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--threads", "1", "--parallel", "1"]
    process = subprocess.Popen(
        [program, "--model", gguf, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _await_health(process, port)
        yield lambda route, body: _post(port, route, body)
    finally:
        process.kill()
        process.wait()


def _await_health(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        connection = HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            assert process.poll() is None, "llama-server did not load the file"
        finally:
            connection.close()
        assert time.monotonic() < deadline, "llama-server is not ready"
        time.sleep(0.05)


def _post(port: int, route: str, body: dict[str, Any]) -> dict[str, Any]:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", route, json.dumps(body), {"Content-Type": "application/json"})
        answer: dict[str, Any] = json.load(connection.getresponse())
    finally:
        connection.close()
    return answer
