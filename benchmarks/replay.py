"""`llmserve bench replay`: recorded traffic to our server and to llama.cpp's, one after the other.

The same requests at the same times with the same objectives; what is compared is how many of them
each answers in time, over the whole trace and stretch by stretch (`compare_page.py`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from llmserve.durable import write_bytes
from llmserve.errors import EngineError, LLMServeError

from .client import COMPLETIONS_ENDPOINT
from .compare import compare_results, read_results
from .compare_page import compare_page, goodput_plot, span_of, timeline_of
from .machine import command_line
from .offline_contenders import OfflineOptions
from .options import DEFAULT_LATENCIES, OPEN_LOOP_LATENCIES, ServeOptions
from .peer_servers import llama_server, our_server
from .plots import standalone
from .running_server import PeerServer
from .serve import bench_serve
from .traces import Trace
from .traffic import Traffic

__all__ = ["ReplayOptions", "bench_replay"]

REQUEST_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """One trace for both servers."""

    model: Path
    """The float model folder; the forms lie beside it, as for `bench offline`."""
    scheme: str
    trace: Trace
    slos_ms: Mapping[str, float]
    llama_cpp: Path
    """Folder of llama.cpp's programs."""
    slots: int
    """Requests that llama.cpp's server computes at a time."""
    out: Path
    """Folder for results, page and plot."""
    seed: int = 0
    """Of the prompts."""


def bench_replay(options: ReplayOptions) -> int:
    """Replay, compare, save; the exit code.

    0: every request of both succeeded. 1: some failed.

    Raises:
        ConfigError: a form of the model or a program is missing.
        LLMServeError: a server did not start, or a file could not be written.
    """
    size = options.trace.size(1)
    servers = list(_servers(options, size.max_len))  # what is missing is told before any starts
    code = 0
    for server in servers:
        code |= _replay(server, options, size.num_requests)
    results = {server.engine: _result(options, server) for server in servers}
    _save(options, results)
    return code


def _servers(options: ReplayOptions, max_len: int) -> Iterator[PeerServer]:
    wanted = OfflineOptions(model=options.model, schemes=(options.scheme,))
    yield our_server(wanted, options.scheme)
    yield llama_server(
        wanted, options.llama_cpp, options.scheme, slots=options.slots, request_len=max_len
    )


def _replay(server: PeerServer, options: ReplayOptions, num_requests: int) -> int:
    with (
        tempfile.NamedTemporaryFile(prefix="llmserve-replay-") as log,
        server.start(log) as running,
    ):
        running.wait()
        wanted = ServeOptions(
            base_url=running.base_url,
            endpoint=COMPLETIONS_ENDPOINT,
            model=server.model,
            body=server.body,
            traffic=Traffic(num_prompts=num_requests, trace=options.trace),
            seed=options.seed,
            latencies=(*DEFAULT_LATENCIES, *OPEN_LOOP_LATENCIES),
            slos_ms=options.slos_ms,
            request_timeout_s=REQUEST_TIMEOUT_S,
            label=server.engine,
            save_result=True,
            save_detailed=True,
            result_dir=options.out,
            result_filename=f"{server.engine}.json",
        )
        return bench_serve(wanted)


def _result(options: ReplayOptions, server: PeerServer) -> Mapping[str, Any]:
    [result] = read_results(options.out / f"{server.engine}.json")
    if not result["completed"]:
        raise EngineError(f"{server.engine} answered no request of the trace")
    return result


def _save(options: ReplayOptions, results: Mapping[str, Mapping[str, Any]]) -> None:
    """The page, the plot, and one document without the figures of each request."""
    span_s = span_of(list(results.values()))
    timelines = {
        name: timeline_of(result, options.slos_ms, span_s=span_s)
        for name, result in results.items()
    }
    names = list(results)
    a, b = results.values()
    sentences = {one.key: one.sentence() for one in compare_results([a], [b])}
    document = {
        "benchmark": "replay",
        "date": b["date"],
        "trace": options.trace.path.name,
        "slos_ms": dict(options.slos_ms),
        "comparison": sentences,
        "runs": [
            {key: value for key, value in result.items() if not isinstance(value, list)}
            | {"attained": timelines[name].attained, "timeline": asdict(timelines[name])}
            for name, result in results.items()
        ],
        "command": command_line(),
    }
    page = compare_page(names, list(timelines.values()), options.slos_ms, sentences)
    files = {
        "replay.html": page.encode(),
        "replay.svg": standalone(goodput_plot(names, list(timelines.values()))).encode(),
        "replay.json": orjson.dumps(document, option=orjson.OPT_INDENT_2),
    }
    try:
        for name, data in files.items():
            write_bytes(options.out / name, data)
    except OSError as error:
        raise LLMServeError(f"cannot save the replay in {options.out}: {error}") from error
    for name, one in timelines.items():
        print(f"{name}: {one.attained:.1%} of the requests in time")
    print(orjson.dumps(document).decode(), flush=True)
