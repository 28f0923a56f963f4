"""What clients see when engines die, hang or crash on a request: a pause, and at most one error
(R14 and the supervisor's rules, docs/processes.md)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from support.models import make_model_folder
from support.serving import (
    ServeProcess,
    assert_clean_end,
    get,
    in_threads,
    metric,
    post,
    read,
    reply,
    serving,
)

pytestmark = pytest.mark.http

SIZE = ("--max-num-batched-tokens", "64", "--limit", "engine_stall_s=0.5")
"""No steps at the start to find the size of one: the first steps are those of requests."""
POISON = [7, 8, 9]
"""A prompt that the failpoint `engine.poison` knows."""
REQUESTS: list[dict[str, object]] = [
    {"prompt": [5, 6] * 40, "max_tokens": 120, "temperature": 0, "logprobs": 3},
    {"prompt": "Once upon a time", "max_tokens": 100, "seed": 3, "n": 3, "ignore_eos": True},
    {"prompt": "One day she", "max_tokens": 90, "seed": 4, "top_p": 0.9, "logprobs": 1},
    {"prompt": ["a dog", "hello"], "max_tokens": 80, "seed": 5, "stop": ["a", "e"], "n": 2},
    {"prompt": "Lily", "max_tokens": 100, "seed": 6, "repetition_penalty": 1.3, "min_tokens": 60},
    {"prompt": "1234567890", "max_tokens": 70, "seed": 7, "prompt_logprobs": 2, "echo": True},
    {"prompt": [5, 6, 7] * 40, "max_tokens": 0, "prompt_logprobs": 1},
]
GRAMMAR = {"structured_outputs": {"regex": "([a-z]{9} ){6}"}, "ignore_eos": False}
HAS_GRAMMARS = find_spec("llguidance") is not None
if HAS_GRAMMARS:
    REQUESTS += [{"prompt": "Once", "max_tokens": 90, "seed": 8, "n": 2, **GRAMMAR}]
TEXTS = ["a long day " * (3 + index % 7) for index in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Iterator[list[object]]:
    """The replies of a server that nothing happens to."""
    with serving(folder, *SIZE) as server:
        url = server.wait_until_ready()
        yield [reply(url, body) for body in REQUESTS]


@pytest.mark.parametrize("replicas", [1, 2])
def test_engines_killed_at_every_twentieth_step_change_no_token_and_no_logprob(
    folder: Path, undisturbed: list[object], replicas: int
) -> None:
    environment = {"LLMSERVE_FAILPOINTS": "engine.forward=kill@20"}
    options = (*SIZE, "--replicas", str(replicas))
    with serving(folder, *options, environment=environment) as server:
        url = server.wait_until_ready()
        assert len(server.engines()) == replicas
        replies: dict[int, object] = {}
        ask = lambda index: replies.__setitem__(index, reply(url, REQUESTS[index]))  # noqa: E731
        for thread in in_threads(len(REQUESTS), ask):
            thread.join(30)
        assert [replies[index] for index in range(len(REQUESTS))] == undisturbed
        assert server.output.count("by signal 9") >= 5
        server.process.send_signal(signal.SIGTERM)
        assert_clean_end(server, url)


def vectors(folder: Path, **environment: str) -> tuple[list[object], float]:
    """Embeddings of `TEXTS`, and how often the engine was replaced meanwhile."""
    with serving(folder, *SIZE, environment=environment) as server:
        url = server.wait_until_ready()
        status, body = post(url, {"input": TEXTS}, route="embeddings")
        assert status == 200, body
        found = [entry["embedding"] for entry in json.loads(body)["data"]]
        return found, metric(url, "llmserve_engine_restarts_total")


def test_prompts_that_are_only_read_are_read_again(folder: Path) -> None:
    undisturbed, none = vectors(folder)
    disturbed, restarts = vectors(folder, LLMSERVE_FAILPOINTS="engine.forward=kill@5")
    assert disturbed == undisturbed
    assert none == 0 < restarts


def test_a_trace_goes_on_over_the_engines_that_had_the_request(folder: Path) -> None:
    environment = {"LLMSERVE_FAILPOINTS": "engine.forward=kill@20"}
    with serving(folder, "--runner", "fake", *SIZE, environment=environment) as server:
        url = server.wait_until_ready()
        _, body = post(url, {"prompt": "x", "max_tokens": 50, "ignore_eos": True})
        (trace,) = json.loads(read(url, f"/requests/{json.loads(body)['id']}/trace"))["prompts"]
    assert trace["output_tokens"] == 50
    assert trace["finish_reasons"] == ["length"]
    kinds = [step["kind"] for step in trace["steps"]]
    assert kinds.count("prefill") == 3, "each engine reads what was delivered before"
    times = [step["at_s"] for step in trace["steps"]]
    assert times == sorted(times)


def stream_all(server: ServeProcess, url: str, count: int, disturb: object) -> list[bytes]:
    """`count` streams, in the midst of which `disturb` is called with their server."""
    body = {"prompt": "x", "stream": True, "ignore_eos": True, "max_tokens": 80, "temperature": 0}
    replies: dict[int, tuple[int, bytes]] = {}
    threads = in_threads(
        count, lambda index: replies.__setitem__(index, post(url, {**body, "prompt": [index + 20]}))
    )
    deadline = time.monotonic() + 10
    while metric(url, "llmserve_num_requests_running") == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    disturb(server)  # type: ignore[operator]
    for thread in threads:
        thread.join(30)
    assert [status for status, _ in replies.values()] == [200] * count
    return [texts(replies[index][1]) for index in range(count)]


def texts(body: bytes) -> bytes:
    """The text of a stream that ended well."""
    assert body.endswith(b"data: [DONE]\n\n"), body[-200:]
    events = [json.loads(line[6:]) for line in body.split(b"\n\n")[:-2]]
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    return "".join(event["choices"][0]["text"] for event in events).encode()


def kill_engine(server: ServeProcess) -> None:
    engine = server.engine()
    engine.kill()
    engine.wait(5)


def stop_engine(server: ServeProcess) -> None:
    engine = server.engine()
    engine.send_signal(signal.SIGSTOP)
    engine.wait(10)


def kill_loader(server: ServeProcess) -> None:
    """The engine goes on without it; a new one is there for the engine's own end."""
    loader, engine = server.loader(), server.engine()
    loader.kill()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        children = psutil.Process(server.process.pid).children()
        if any(child.pid != loader.pid for child in children):
            break
        time.sleep(0.02)
    os.kill(engine.pid, signal.SIGKILL)


def test_streams_go_on_when_engine_or_loader_is_killed_or_stopped(folder: Path) -> None:
    with serving(folder, "--runner", "fake:0.01", *SIZE) as server:
        url = server.wait_until_ready()
        wanted = stream_all(server, url, 5, lambda _: None)
        for disturb in (kill_engine, stop_engine, kill_loader):
            assert stream_all(server, url, 5, disturb) == wanted, disturb
        assert get(url, "/health") == 200
        server.process.send_signal(signal.SIGTERM)
        assert_clean_end(server, url)


def test_a_server_never_goes_on_with_other_weights(folder: Path, tmp_path: Path) -> None:
    served = make_model_folder(tmp_path / "served")
    with serving(served, "--runner", "fake", *SIZE) as server:
        url = server.wait_until_ready()
        reply(url, {"prompt": "x", "max_tokens": 3})
        shutil.rmtree(served)
        shutil.copytree(folder, served)  # the same model: only its files are others
        loader, engine = server.loader(), server.engine()
        loader.kill()
        loader.wait(5)
        assert reply(url, {"prompt": "x", "max_tokens": 3}), "the engine goes on"
        os.kill(engine.pid, signal.SIGKILL)
        assert_clean_end(server, url, code=1)
        assert "were changed since the start" in server.lines[-1]


@pytest.mark.parametrize("action", ["abort", "hang"])
def test_a_poison_request_fails_alone(folder: Path, action: str) -> None:
    """R14: isolation, then recovery."""

    def poison(server: ServeProcess) -> None:
        status, body = post(url, {"prompt": POISON, "max_tokens": 5})
        assert status == 500
        assert "crashed on this request" in json.loads(body)["error"]["message"]

    environment = {"LLMSERVE_FAILPOINTS": f"engine.poison={action}"}
    with serving(folder, "--runner", "fake:0.01", *SIZE, environment=environment) as server:
        url = server.wait_until_ready()
        wanted = stream_all(server, url, 5, lambda _: None)
        assert stream_all(server, url, 5, poison) == wanted
        assert server.output.count(" requests wait") == 3
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0


@pytest.mark.skipif(not HAS_GRAMMARS, reason="needs llguidance")
def test_a_grammar_that_crashes_engines_fails_alone(folder: Path) -> None:
    environment = {"LLMSERVE_FAILPOINTS": "engine.grammar=abort"}
    with serving(folder, "--runner", "fake", *SIZE, environment=environment) as server:
        url = server.wait_until_ready()
        status, body = post(url, {"prompt": "x", "structured_outputs": {"regex": "a"}})
        assert status == 500, body
        assert "crashed on this request" in json.loads(body)["error"]["message"]
        reply(url, {"prompt": "x", "max_tokens": 3})


@pytest.mark.skipif(not HAS_GRAMMARS, reason="needs llguidance")
def test_engines_inherit_what_compiles_grammars(tmp_path: Path) -> None:
    """Without the tokenizer's file, which an engine that loads it itself would need."""
    served = make_model_folder(tmp_path / "served")
    with serving(served, "--runner", "fake", *SIZE) as server:
        url = server.wait_until_ready()

        def ask(regex: str) -> None:
            reply(url, {"prompt": "x", "structured_outputs": {"regex": regex}, "ignore_eos": False})

        ask("[ab]{3}")
        kill_engine(server)
        ask("[ab]{4}")  # the engine that answers was forked after the loader had loaded it
        (served / "tokenizer.json").rename(tmp_path / "away.json")
        kill_engine(server)
        ask("[ab]{5}")


def test_a_step_that_fails_once_fails_nobody(folder: Path) -> None:
    environment = {"LLMSERVE_FAILPOINTS": "engine.forward=raise@30"}
    with serving(folder, "--runner", "fake", *SIZE, environment=environment) as server:
        url = server.wait_until_ready()
        reply(url, {"prompt": "x", "max_tokens": 100})
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        assert server.output.count("fired at hit 30; 1 requests wait") == 3


def test_engines_that_serve_nobody_end_the_server_with_a_code(folder: Path) -> None:
    """R14: fail-stop."""
    environment = {"LLMSERVE_FAILPOINTS": "engine.forward=raise"}
    with serving(folder, "--runner", "fake", *SIZE, environment=environment) as server:
        url = server.wait_until_ready()
        status, body = post(url, {"prompt": "x", "max_tokens": 3})
        assert status == 500, body
        assert_clean_end(server, url, code=1)
        assert "engines end on every request" in server.lines[-1]
