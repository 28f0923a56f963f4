"""Ranks of a model as threads of the test's process: the same code, and no process to start."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Callable
from typing import cast

from llmserve.runners.rank_processes import RankProcess
from llmserve.runners.torch_rank import serve_rank

Serve = Callable[[socket.socket], int]


class ThreadProcess:
    """What a `RankProcess` asks of its process, of a thread."""

    pid = 0

    def __init__(self, serve: Serve, connection: socket.socket) -> None:
        self._status: int | None = None
        self._thread = threading.Thread(target=self._run, args=(serve, connection), daemon=True)
        self._thread.start()

    def _run(self, serve: Serve, connection: socket.socket) -> None:
        with connection:
            self._status = serve(connection)

    def poll(self) -> int | None:
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        self._thread.join(timeout)
        if self._status is None:
            raise subprocess.TimeoutExpired("a rank", timeout or 0.0)
        return self._status

    def kill(self) -> None:
        """A thread cannot be killed: it must end by itself."""


def in_threads(serve: Serve = serve_rank) -> Callable[[int], RankProcess]:
    """Starts ranks that do what `serve` does with their end of the connection."""

    def start(index: int) -> RankProcess:
        ours, theirs = socket.socketpair()
        process = ThreadProcess(serve, theirs)
        return RankProcess(index, ours, cast("subprocess.Popen[bytes]", process))

    return start
