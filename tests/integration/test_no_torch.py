"""Serving on a CPU needs no torch: neither process of the server loads it, nor does `LLM`."""

from __future__ import annotations

import json
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from support.models import make_model_folder
from support.serving import serving

pytestmark = [pytest.mark.native]
pytest.importorskip("llmserve.native._kernels", reason="the kernels are not built here")

OFFLINE = """
import sys
from llmserve.llm import LLM
from llmserve.sampling import SamplingParams
with LLM(sys.argv[1]) as llm:
    assert llm.info.runner == "native", llm.info
    llm.generate([[5, 9]], SamplingParams(max_tokens=3, temperature=0.0))
assert "torch" not in sys.modules
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model") / "model")


def test_generating_offline_imports_no_torch(folder: Path) -> None:
    subprocess.run([sys.executable, "-c", OFFLINE, str(folder)], check=True)


@pytest.mark.http
@pytest.mark.skipif(sys.platform != "linux", reason="what a process maps is read from /proc")
def test_neither_process_of_the_server_loads_torch(folder: Path) -> None:
    with serving(folder) as server:
        url = server.wait_until_ready()
        body = json.dumps({"model": "model", "prompt": "a", "max_tokens": 2}).encode()
        connection = HTTPConnection(urlsplit(url).netloc, timeout=20)
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        assert connection.getresponse().status == 200
        connection.close()
        for pid in (server.process.pid, server.engine().pid):
            maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")
            assert "_kernels" in maps or pid == server.process.pid
            assert "torch" not in maps
