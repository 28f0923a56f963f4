"""`llmserve serve` in a process of its own, as a user starts it."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

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

    def engine(self) -> psutil.Process:
        """The engine's process."""
        (child,) = psutil.Process(self.process.pid).children()
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
