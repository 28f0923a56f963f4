"""`llmserve serve --runner onnx` as a user starts it: no torch in either process, and the card."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from llmserve.export.export_onnx import export_onnx
from llmserve.llm import LLM
from llmserve.sampling import SamplingParams
from support.models import make_model_folder
from support.serving import ServeProcess, serving

pytestmark = [pytest.mark.onnx, pytest.mark.http]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_model_folder(tmp_path_factory.mktemp("run") / "model")
    export_onnx(model, model.with_name("graph"), scheme="int8")
    return model.with_name("graph")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServeProcess]:
    with serving(folder, "--runner", "onnx") as process:
        process.wait_until_ready()
        yield process


def ask(server: ServeProcess, method: str, path: str, body: object = None) -> Any:
    """The JSON of a reply with status 200."""
    connection = HTTPConnection(urlsplit(server.wait_until_ready()).netloc, timeout=20)
    headers = {"Content-Type": "application/json"}
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    assert reply.status == 200, content
    return json.loads(content)


def test_completion_is_the_graphs(server: ServeProcess, folder: Path) -> None:
    body = {"model": "graph", "prompt": [5, 9, 7], "max_tokens": 8, "temperature": 0}
    answer = ask(server, "POST", "/v1/completions", body)["choices"][0]["text"]
    with LLM(folder, runner="onnx") as llm:
        params = SamplingParams(max_tokens=8, temperature=0.0)
        assert answer == llm.generate([[5, 9, 7]], params)[0].text


def test_card_names_the_form_and_holds_the_certificate(server: ServeProcess, folder: Path) -> None:
    card = ask(server, "GET", "/v1/models/graph")
    assert card["runner"] == "onnx"
    assert card["executed_form"] == "int8 weights, int8 activations, int8 head (ONNX Runtime)"
    written = json.loads((folder / "certificate.json").read_text())
    assert card["certificate"]["manifest_sha256"] == written["manifest_sha256"]
    assert [form["mean_kl"] for form in card["certificate"]["forms"]] == [
        form["mean_kl"] for form in written["forms"]
    ]
    assert "scatter" not in card["certificate"]["forms"][0]


@pytest.mark.skipif(sys.platform != "linux", reason="what a process maps is read from /proc")
def test_neither_process_loads_torch(server: ServeProcess) -> None:
    for pid in (server.process.pid, server.engine().pid):
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")
