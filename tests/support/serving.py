"""`llmserve serve` in a process of its own, as a user starts it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil

START_TIMEOUT_S = 40.0


class ServeProcess:
    """A server process; its messages are collected by a thread."""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llmserve", "serve", *arguments, "--port", "0"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def output(self) -> str:
        """Everything it has said."""
        return "".join(self.lines)

    def wait_until_ready(self) -> str:
        """The server's URL, once it says so."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            match = re.search(r"^API +(http\S+)/v1$", self.output, re.MULTILINE)
            if match:
                return match[1]
            if self.process.poll() is not None:
                self._reader.join(5)
                raise AssertionError(f"the server ended at its start:\n{self.output}")
            time.sleep(0.02)
        raise AssertionError(f"the server did not start:\n{self.output}")

    def loader(self) -> psutil.Process:
        """The process that engines are forked from."""
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def process_tree(self) -> list[psutil.Process]:
        """All its processes, without itself."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def engines(self) -> list[psutil.Process]:
        """The engines' processes; none for the moment in which one is replaced."""
        return [
            child for child in self.loader().children() if child.status() != psutil.STATUS_ZOMBIE
        ]

    def engine(self) -> psutil.Process:
        """The only engine's process."""
        (child,) = self.engines()
        return child

    def wait(self, timeout: float = 20.0) -> int:
        """Its exit code; all it said is in `output` afterwards."""
        code = self.process.wait(timeout)
        self._reader.join(5)
        return code


@contextlib.contextmanager
def serving(
    folder: Path | str, *arguments: str, environment: dict[str, str] | None = None
) -> Iterator[ServeProcess]:
    """A server process that is gone afterwards, with its engine."""
    server = ServeProcess(str(folder), *arguments, environment=environment)
    try:
        yield server
    finally:
        children = []
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(server.process.pid).children(recursive=True)
        for process in (server.process, *children):
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()
        server.wait()
        assert server.process.stdout is not None
        server.process.stdout.close()


def post(
    url: str, body: dict[str, object], timeout: float = 30.0, *, route: str = "completions"
) -> tuple[int, bytes]:
    """A completion, or another route below /v1: status and body."""
    request = urllib.request.Request(  # noqa: S310
        f"{url}/v1/{route}", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    return _open(request, timeout)


def reply(url: str, body: dict[str, object]) -> object:
    """What a completion says, without what differs between any two."""
    status, data = post(url, {"ignore_eos": True, **body})
    assert status == 200, data
    value = json.loads(data)
    return value["choices"], value["usage"]["completion_tokens"]


def load_model(url: str, **body: object) -> tuple[int, dict[str, object]]:
    """POST /admin/models/load: status, and what it says."""
    request = urllib.request.Request(  # noqa: S310
        url + "/admin/models/load", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    status, data = _open(request, 120)
    return status, json.loads(data)


def get(url: str, path: str) -> int:
    """The status of a route."""
    return _open(urllib.request.Request(url + path), 10)[0]  # noqa: S310


def read(url: str, path: str) -> str:
    """What a route says, which must be 200."""
    status, body = _open(urllib.request.Request(url + path), 10)  # noqa: S310
    assert status == 200, body
    return body.decode()


def metrics(url: str) -> dict[str, float]:
    """The numbers of `/metrics`, by name and labels as they are written."""
    lines = (line.rpartition(" ") for line in read(url, "/metrics").splitlines() if line[:1] != "#")
    return {name: float(value) for name, _, value in lines}


def metric(url: str, name: str) -> float:
    """One number of `/metrics` that has no label but the only model's name."""
    (value,) = [
        value for key, value in metrics(url).items() if key.startswith(name + "{model_name=")
    ]
    return value


def _open(request: urllib.request.Request, timeout: float) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:  # noqa: S310
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def in_threads(count: int, work: Callable[[int], None]) -> list[threading.Thread]:
    """Start `work` with each index in a thread of its own."""
    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    return threads


def assert_clean_end(server: ServeProcess, url: str, code: int = 0) -> None:
    """The exit code, no traceback, the port free, no process left."""
    assert server.wait() == code, server.output
    assert "Traceback" not in server.output
    address = (urlsplit(url).hostname, urlsplit(url).port)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    marker = "llmserve.server.engine_loader"
    for process in psutil.process_iter(["cmdline", "ppid"]):
        is_engine = marker in (process.info["cmdline"] or ())
        assert not (is_engine and process.info["ppid"] == 1), "an orphan engine"
