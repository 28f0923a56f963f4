"""`llmserve bench startup`: what it takes until the first token, in space and in time.

Measured from outside, on processes of its own: the size of the installed packages, the time to
import, and a server from its start to its first answered token, with its resident memory and that
of its engine. Every start is one run; the median of several is told, for the first one also reads
the model from the disk.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path

import orjson

from llmserve.errors import ConfigError
from llmserve.event_loop import run_loop

from .client import Client, ServerError, Target
from .machine import command_line, machine, versions
from .ready import list_models
from .workload import Prompt

__all__ = ["Startup", "StartupOptions", "bench_startup", "installed_bytes", "measure_startup"]

READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0
PROJECT = "llmserve"
NAME = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class StartupOptions:
    """What is started."""

    model: Path
    repeats: int = 3
    """Starts of the server, and imports."""
    arguments: tuple[str, ...] = ()
    """More for `llmserve serve`."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ConfigError(f"--repeats must be at least 1, got {self.repeats}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Startup:
    """One start of a server. Seconds count from the start of its process."""

    listening_s: float
    """To the first answer of `/v1/models`."""
    first_token_s: float
    """To the first token of the first answer."""
    resident_bytes: int | None
    """Of all its processes after that, shared pages counted once for each; None: unknown."""
    proportional_bytes: int | None
    """The same with shared pages divided among those that share them."""


def bench_startup(options: StartupOptions) -> int:
    """Measure, print a table and, as the last line, JSON; the exit code, 0.

    Raises:
        ServerError: a server did not start or did not answer.
    """
    imports = [_import_s() for _ in range(options.repeats)]
    starts = [measure_startup(options) for _ in range(options.repeats)]
    size = installed_bytes()
    middle = {
        name: _median([getattr(start, name) for start in starts])
        for name in ("listening_s", "first_token_s", "resident_bytes", "proportional_bytes")
    }
    result = {
        "benchmark": "startup",
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "model": options.model.name,
        "repeats": options.repeats,
        "installed_bytes": size,
        "import_s": statistics.median(imports),
        **middle,
        "runs": [
            {"listening_s": one.listening_s, "first_token_s": one.first_token_s,
             "resident_bytes": one.resident_bytes, "proportional_bytes": one.proportional_bytes}
            for one in starts
        ],
        "import_runs_s": imports,
        "machine": machine(),
        "versions": versions(("numpy", "torch")),
        "command": command_line(),
    }  # fmt: skip
    print("\n".join(_table(result)))
    print(orjson.dumps(result).decode(), flush=True)
    return 0


def measure_startup(options: StartupOptions) -> Startup:
    """Start a server of the model, ask for one token, and stop it.

    Raises:
        ServerError: it ended, or did not answer in time.
    """
    port = _free_port()
    words = [sys.executable, "-m", "llmserve", "serve", str(options.model), "--port", str(port)]
    begun_s = time.perf_counter()
    process = subprocess.Popen(  # noqa: S603 - our own program, the options are the user's
        [*words, *options.arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        listening_s, first_s = run_loop(_first_token(url, process))
        return Startup(
            listening_s=listening_s - begun_s,
            first_token_s=first_s - begun_s,
            resident_bytes=_memory(process.pid, "Rss"),
            proportional_bytes=_memory(process.pid, "Pss"),
        )
    finally:
        _stop(process)


def installed_bytes(project: str = PROJECT) -> dict[str, int]:
    """Size by package of `project` and all that it needs, extras left out; files that are there."""
    sizes: dict[str, int] = {}
    wanted = [project]
    while wanted:
        name = _normal(wanted.pop())
        if name in sizes:
            continue
        try:
            files = distribution(name).files or []
        except PackageNotFoundError:
            continue  # for another system
        sizes[name] = sum(_size(Path(str(file.locate()))) for file in files)
        needs = [need for need in requires(name) or [] if "extra ==" not in need]
        wanted += [match[0] for need in needs if (match := NAME.match(need))]
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


async def _first_token(url: str, process: subprocess.Popen[bytes]) -> tuple[float, float]:
    """When it listened and when the first token came."""
    target = Target(base_url=url, body={"ignore_eos": True, "temperature": 0})
    async with Client(target) as client:
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while True:
            if process.poll() is not None:
                said = process.stderr.read().decode("utf-8", "replace") if process.stderr else ""
                raise ServerError(f"the server ended ({process.returncode}): {said[-500:].strip()}")
            try:
                models = await list_models(client, deadline_s=0.0)
                break
            except ServerError:
                if time.monotonic() > deadline_s:
                    raise
                await asyncio.sleep(0.005)
        listening_s = time.perf_counter()
        client.target = Target(base_url=url, model=str(models[0]["id"]), body=target.body)
        prompt = Prompt(index=0, content=[1], num_tokens=1, output_len=1)
        record = await client.complete(prompt)
        if not record.is_success:
            raise ServerError(f"the first request failed: {record.error}")
        return listening_s, record.chunk_times_s[0]


def _import_s() -> float:
    """Seconds of `import llmserve.llm` in a new process, its own start taken off."""
    code = (
        "import time; t = time.perf_counter(); import llmserve.llm; print(time.perf_counter() - t)"
    )
    done = subprocess.run(  # noqa: S603 - this Python and the line above
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def _memory(pid: int, name: str) -> int | None:
    """`Rss` or `Pss` of a process and its children, in bytes; None where the system hides them."""
    try:
        found = [_rollup(one, name) for one in _family(pid)]
    except OSError:
        return None
    return sum(found)


def _rollup(pid: int, name: str) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    match = re.search(rf"^{name}:\s+(\d+) kB", text, flags=re.MULTILINE)
    return int(match[1]) << 10 if match else 0


def _family(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text(encoding="ascii").split():
            yield from _family(int(child))


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.communicate(timeout=STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _table(result: Mapping[str, object]) -> Iterator[str]:
    found = result["installed_bytes"]
    sizes = found if isinstance(found, dict) else {}
    total = sum(sizes.values())
    largest = ", ".join(f"{name} {size / 1e6:.0f}" for name, size in list(sizes.items())[:4])
    yield f"{'installed':<28}{total / 1e6:.0f} MB ({largest})"
    for key, title in (
        ("import_s", "import llmserve.llm"),
        ("listening_s", "start to /v1/models"),
        ("first_token_s", "start to the first token"),
    ):
        yield f"{title:<28}{result[key]:.3f} s"
    for key, title in (
        ("resident_bytes", "resident, all processes"),
        ("proportional_bytes", "the same, shared pages once"),
    ):
        value = result[key]
        yield f"{title:<28}{f'{value / 1e6:.0f} MB' if isinstance(value, float | int) else '-'}"
