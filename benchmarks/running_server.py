"""A server as a contender: started on a free port, known to be ready, and stopped with all of it.

Ours and other programs alike; `peer_servers.py` says how each is started.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import IO, Any

from llmserve.errors import ConfigError, EngineError

__all__ = ["GREEDY", "PeerServer", "RunningServer"]

STOP_TIMEOUT_S = 20.0
_POLL_S = 0.05
_LOG_TAIL = 2000

GREEDY: Mapping[str, object] = MappingProxyType({"temperature": 0.0, "ignore_eos": True})


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerServer:
    """One server with one form of the model."""

    scheme: str
    engine: str
    weights: str
    """As in `Contender.description`; empty: what the server says itself."""
    cache: str
    versions: Mapping[str, str]
    command: tuple[str, ...]
    """`{port}` stands for the port."""
    environment: Mapping[str, str]
    is_ours: bool = False
    body: Mapping[str, object] = field(default_factory=lambda: GREEDY)
    """Fields of each request: no sampling, no end before the length asked."""
    model: str | None = None
    """Name in requests; None: the first that it lists."""
    ready_timeout_s: float = 180.0
    """From its start until it has to answer."""

    def start(self, log: IO[bytes]) -> RunningServer:
        """Start it on a free port; what it prints goes to `log`. Raises `ConfigError`."""
        return RunningServer(self, log)


class RunningServer:
    """A started server. Use it as a context manager: it ends with the block."""

    def __init__(self, server: PeerServer, log: IO[bytes]) -> None:
        """Raises `ConfigError` if there is no such program."""
        port = _free_port()
        self.base_url = f"http://127.0.0.1:{port}"
        self._server, self._log = server, log
        command = [part.format(port=port) for part in server.command]
        self._start_s = time.perf_counter()
        try:
            # A session of its own: Ctrl-C reaches this process alone, which then stops the server.
            self._process = subprocess.Popen(  # noqa: S603 - the programs are the user's choice
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(server.environment),
                start_new_session=True,
            )
        except OSError as error:
            raise ConfigError(f"{command[0]} cannot be run: {error.strerror}") from error

    def wait(self) -> float:
        """Seconds from the start until `/health` answers. Raises `EngineError` if it never does."""
        limit_s = self._server.ready_timeout_s
        while time.perf_counter() - self._start_s < limit_s:
            if self._process.poll() is not None:
                raise EngineError(f"{self._server.engine} ended while it started: {self._tail()}")
            if _is_healthy(self.base_url):
                return time.perf_counter() - self._start_s
            time.sleep(_POLL_S)
        raise EngineError(
            f"{self._server.engine} was not ready after {limit_s:g} s: {self._tail()}"
        )

    def resident_bytes(self) -> int | None:
        """Memory of its processes now, what they share counted once; None: not told here."""
        try:
            return sum(map(_proportional_bytes, _session(self._process.pid)))
        except OSError:
            return None

    def stop(self) -> None:
        """End it and whatever it started."""
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):  # then it is killed below
                self._process.wait(STOP_TIMEOUT_S)
        with suppress(ProcessLookupError):  # nothing of it may be left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _tail(self) -> str:
        self._log.flush()
        text = Path(self._log.name).read_bytes()[-_LOG_TAIL:].decode("utf-8", "replace")
        lines = [line for line in text.splitlines() if line.strip()]
        return lines[-1] if lines else "it printed nothing"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _is_healthy(base_url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{base_url}/health", timeout=5) as reply:  # noqa: S310 - http
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _session(leader: int) -> list[int]:
    """Processes of the session that `leader` began."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has just ended
            if int(fields[3]) == leader:
                found.append(int(folder.name))
    return found


def _proportional_bytes(process: int) -> int:
    rows = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    sizes: dict[str, Any] = {row.split()[0]: row.split()[1] for row in rows if row[:3] == "Pss"}
    return int(sizes["Pss:"]) * 1024
