"""Servers as contenders: how each is started, known to be ready, and stopped. Nothing else.

Ours and the peers get the same requests from the same client, so all that an entry here holds is a
command, what the weights and the cache are, and the fields by which a server is told to answer
greedily and past the end token. OpenVINO GenAI and onnxruntime-genai are libraries without a server
of their own, so they appear in process only.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import IO, Any

from llmserve.errors import ConfigError, EngineError

from .offline_contenders import OfflineOptions, llama_cpp_file, our_folder
from .peer_llamacpp import LlamaCpp, program_version
from .peer_process import peer_environment

__all__ = ["PeerServer", "RunningServer", "llama_server", "our_server", "servers_of"]

LLAMA_SERVER = "llama-server"
READY_TIMEOUT_S = 180.0
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
        while time.perf_counter() - self._start_s < READY_TIMEOUT_S:
            if self._process.poll() is not None:
                raise EngineError(f"{self._server.engine} ended while it started: {self._tail()}")
            if _is_healthy(self.base_url):
                return time.perf_counter() - self._start_s
            time.sleep(_POLL_S)
        raise EngineError(
            f"{self._server.engine} was not ready after {READY_TIMEOUT_S:.0f} s: {self._tail()}"
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


def servers_of(options: OfflineOptions, *, slots: int, request_len: int) -> Iterator[PeerServer]:
    """Ours for every scheme, then those of the peers that were named and have one.

    `slots` is the most requests at a time and `request_len` the tokens of one, prompt and answer:
    a peer whose cache has to be sized beforehand gets room for as many.

    Raises:
        ConfigError: a form of the model or a program is missing; the message says what to do.
    """
    for scheme in options.schemes:
        yield our_server(options, scheme)
    if options.llama_cpp is not None:
        for scheme in options.schemes:
            yield llama_server(
                options, options.llama_cpp, scheme, slots=slots, request_len=request_len
            )
    if options.transformers is not None:
        yield _transformers_serve(options, options.transformers)


def our_server(options: OfflineOptions, scheme: str, *extra: str) -> PeerServer:
    """`llmserve serve` as it is, for every row of a table; `extra` are more options of it."""
    folder = our_folder(options.model, scheme)
    command = [sys.executable, "-m", "llmserve", "serve", str(folder), "--port", "{port}", *extra]
    if options.runner != "auto":
        command += ["--runner", options.runner]
    if options.threads is not None:
        command += ["--threads", str(options.threads)]
    return PeerServer(
        scheme=scheme,
        engine="llmserve",
        weights="",
        cache="",
        versions={},
        command=tuple(command),
        environment=dict(os.environ),
        is_ours=True,
    )


def llama_server(
    options: OfflineOptions, programs: Path, scheme: str, *, slots: int, request_len: int
) -> PeerServer:
    """llama.cpp's server with `slots` slots of equal room for a prompt and its answer."""
    program = programs / LLAMA_SERVER
    if not program.is_file():
        raise ConfigError(f"{programs} has no {LLAMA_SERVER}; give the folder of the programs")
    file = llama_cpp_file(options.model, scheme)
    # Some tokens of air: a server may put its start token before a prompt.
    room = slots * (request_len + 16)
    threads = str(options.threads or len(os.sched_getaffinity(0)))
    command = [str(program), "-m", str(file), "--host", "127.0.0.1", "--port", "{port}"]
    command += ["-t", threads, "-np", str(slots), "-c", str(room), "--no-kv-unified"]
    command += ["--cache-ram", "0", "--no-ui"]
    return PeerServer(
        scheme=scheme,
        engine="llama.cpp",
        weights=LlamaCpp.weights_of(file),
        cache="f16",
        versions={"llama.cpp": program_version(program)},
        command=tuple(command),
        environment=peer_environment(),
    )


def _transformers_serve(options: OfflineOptions, python: Path) -> PeerServer:
    """`transformers serve` with continuous batching, in bfloat16."""
    program = python.absolute().parent / "transformers"
    if not program.is_file():
        raise ConfigError(f"{python} has no transformers beside it: install transformers[serving]")
    model = str(options.model.absolute())
    threads = str(options.threads or len(os.sched_getaffinity(0)))
    return PeerServer(
        scheme="bf16",
        engine="transformers",
        weights="bf16, bf16 head",
        cache="bf16",
        versions=_installed(python, ("transformers", "torch")),
        command=(
            *(str(program), "serve", "--continuous-batching", "--device", "cpu"),
            *("--dtype", "bfloat16", "--host", "127.0.0.1", "--port", "{port}", model),
        ),
        environment={**peer_environment(), "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"},
        body={"temperature": 0.0, "generation_config": '{"eos_token_id": -1, "do_sample": false}'},
        model=model,
    )


def _installed(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Versions that another interpreter has."""
    code = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]), sep='\\n')"
    done = subprocess.run(  # noqa: S603 - the interpreter is the user's choice
        [str(python), "-c", code, *packages], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ConfigError(f"{python} lacks one of {', '.join(packages)}: install them there")
    return dict(zip(packages, done.stdout.split(), strict=True))


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
