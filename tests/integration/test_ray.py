"""A real Ray cluster on this machine: two replicas, one of them killed under load."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from llmserve.errors import ConfigError
from support.models import make_model_folder
from support.serving import in_threads

ray = pytest.importorskip("ray")

pytestmark = [
    pytest.mark.http,
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]

KEY = "a-long-secret"
NUM_CLIENTS = 8
BODY: dict[str, Any] = {"max_tokens": 150, "ignore_eos": True, "temperature": 0.8}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of two replicas on a cluster of their own."""
    from ray import serve

    from llmserve.server.ray_app import build

    folder = tmp_path_factory.mktemp("ray")
    model = make_model_folder(folder / "tiny", max_seq_len=512)
    (folder / "keys").write_text(KEY + "\n")
    root = Path(__file__).parents[2]
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(root)}},
    )
    try:
        port = _free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        command = f"{model} --api-key-file {folder / 'keys'} --threads 1 --max-num-seqs 4"
        serve.run(build({"serve": command, "replicas": 2, "cpus": 1}))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def _free_port() -> int:
    """Ray does not tell which one it was given when asked for any."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def post(url: str, body: dict[str, Any], key: str = KEY) -> tuple[int, bytes]:
    request = urllib.request.Request(  # noqa: S310
        url + "/v1/completions",
        json.dumps({**BODY, **body}).encode(),
        {"content-type": "application/json", "authorization": f"Bearer {key}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def told(body: dict[str, Any], status: int, reply: bytes) -> str:
    """The text, or how the request failed."""
    if status != 200 or b'"error":' in reply:
        return f"failed: {status} {reply[-300:]!r}"
    if not body.get("stream"):
        return json.loads(reply)["choices"][0]["text"]
    assert reply.endswith(b"data: [DONE]\n\n"), reply[-300:]
    events = [json.loads(block[6:]) for block in reply.split(b"\n\n")[:-2]]
    return "".join(one["choices"][0]["text"] for one in events)


def replicas() -> list[psutil.Process]:
    """The processes that have a loader below them."""
    marker = "llmserve.server.engine_loader"
    return [
        process.parent()
        for process in psutil.process_iter(["cmdline"])
        if marker in (process.info["cmdline"] or ())
        and str(process.parent().name()).startswith("ray::")
    ]


def test_no_request_is_lost_when_a_replica_is_killed_under_load(url: str) -> None:
    bodies = [
        {"prompt": [5 + index, 6], "seed": index, "stream": index % 2 == 0}
        for index in range(NUM_CLIENTS)
    ]
    wanted = []
    for body in bodies:
        wanted.append(told(body, *post(url, body)))
        assert not wanted[-1].startswith("failed")
    before = replicas()
    assert len(before) == 2
    found: dict[int, list[str]] = {index: [] for index in range(NUM_CLIENTS)}
    has_ended: list[float] = []

    def ask(index: int) -> None:
        while not has_ended or time.monotonic() < has_ended[0]:
            found[index].append(told(bodies[index], *post(url, bodies[index])))

    threads = in_threads(NUM_CLIENTS, ask)
    deadline = time.monotonic() + 30
    while not all(found.values()) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(before[0].pid, signal.SIGKILL)
    has_ended.append(time.monotonic() + 3)
    for thread in threads:
        thread.join(60)
    for index in range(NUM_CLIENTS):
        assert len(found[index]) >= 2
        assert set(found[index]) == {wanted[index]}
    while len(replicas()) < 2 and time.monotonic() < deadline + 60:
        time.sleep(0.1)
    assert len(replicas()) == 2, "Ray starts another in its place"
    assert before[0].pid not in {process.pid for process in replicas()}


def test_keys_are_asked_for_and_errors_come_back(url: str) -> None:
    assert post(url, {"prompt": "x"}, key="another-secret")[0] == 401
    status, reply = post(url, {"prompt": "x", "max_tokens": -1})
    assert status == 400
    assert "max_tokens" in json.loads(reply)["error"]["message"]


def test_arguments_of_the_ray_application_are_checked() -> None:
    from llmserve.server.ray_app import build

    for args, message in (
        ({}, "no model"),
        ({"serve": "m", "replica": 2}, "unknown argument 'replica'"),
        ({"serve": "m --port 9"}, "--port has no meaning"),
        ({"serve": "m --no-such"}, "no-such"),
        ({"serve": "m", "replicas": 0}, "replicas must be"),
        ({"serve": "m", "cpus": "x"}, "cpus takes a number"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(args)
