"""A trace to two servers: what is kept of both runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmserve.benchmarks import replay
from llmserve.benchmarks.replay import ReplayOptions, bench_replay
from llmserve.benchmarks.running_server import PeerServer
from llmserve.benchmarks.traces import TraceOptions, open_trace
from llmserve.errors import ConfigError, EngineError
from support.traces import azure_trace


def options(tmp_path: Path) -> ReplayOptions:
    for name in ("m", "m-int4"):
        (tmp_path / name).mkdir()
    (tmp_path / "m-q4_0.gguf").touch()
    trace = open_trace(azure_trace(tmp_path / "t.csv", [(0, 8, 4), (1, 9, 4)]), TraceOptions())
    return ReplayOptions(
        model=tmp_path / "m",
        scheme="int4",
        trace=trace,
        slos_ms={"ttft": 500.0},
        llama_cpp=tmp_path,
        slots=2,
        out=tmp_path / "out",
    )


def result(ttft_s: float) -> dict[str, Any]:
    return {
        "date": "20261129-120000",
        "completed": 2,
        "request_throughput": 2.0,
        "mean_ttft_ms": 1000 * ttft_s,
        "intervals": {"mean_ttft_ms": [990 * ttft_s, 1010 * ttft_s]},
        "start_times": [0.0, 1.0],
        "ttfts": [ttft_s, ttft_s],
        "latencies": [ttft_s, ttft_s],
        "output_lens": [1, 1],
        "errors": ["", ""],
    }


def test_both_runs_are_laid_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = options(tmp_path)
    wanted.out.mkdir()

    def server(engine: str) -> PeerServer:
        return PeerServer(
            scheme="int4", engine=engine, weights="", cache="", versions={}, command=(),
            environment={},
        )  # fmt: skip

    def run(server: PeerServer, _: ReplayOptions, num_requests: int) -> int:
        ttft_s = {"llmserve": 0.1, "llama.cpp": 0.8}[server.engine]
        assert num_requests == 2
        (wanted.out / f"{server.engine}.json").write_text(json.dumps(result(ttft_s)))
        return 0

    monkeypatch.setattr(replay, "_servers", lambda *_: [server("llmserve"), server("llama.cpp")])
    monkeypatch.setattr(replay, "_replay", run)
    assert bench_replay(wanted) == 0
    document = json.loads((wanted.out / "replay.json").read_text())
    assert [one["attained"] for one in document["runs"]] == [1.0, 0.0]
    assert "start_times" not in document["runs"][0]
    assert document["comparison"]["mean_ttft_ms"].startswith("B is 8.00 times slower")
    assert (wanted.out / "replay.svg").read_text().startswith("<svg xmlns")
    assert (
        "B is llama.cpp: 0.0% of the requests in time" in (wanted.out / "replay.html").read_text()
    )


def test_missing_program_is_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="llama-server"):
        bench_replay(options(tmp_path))


def test_run_without_an_answer_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = options(tmp_path)
    wanted.out.mkdir()
    empty = result(0.1) | {"completed": 0}
    (wanted.out / "llmserve.json").write_text(json.dumps(empty))
    ours = next(replay._servers(wanted, 8))
    monkeypatch.setattr(replay, "_servers", lambda *_: [ours])
    monkeypatch.setattr(replay, "_replay", lambda *_: 1)
    with pytest.raises(EngineError, match="llmserve answered no request"):
        bench_replay(wanted)
