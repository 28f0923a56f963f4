"""Engines that only read prompts: the same replies bit for bit, whichever engine dies."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.models import make_model_folder
from support.serving import (
    ServeProcess,
    assert_clean_end,
    in_threads,
    metric,
    post,
    read,
    reply,
    serving,
)

pytestmark = pytest.mark.http

SIZE = ("--max-num-batched-tokens", "64", "--kv-cache-memory", "1M")
SPLIT = (*SIZE, "--prefill-engines", "1")


def ids(count: int, *, start: int = 5) -> list[int]:
    """Some prompt of that length."""
    return [5 + (start + 7 * index * index) % 300 for index in range(count)]


SHARED = ids(128)
REQUESTS: list[dict[str, object]] = [
    {"prompt": ids(3), "max_tokens": 20, "seed": 1},
    {"prompt": ids(64, start=6), "max_tokens": 40, "seed": 2, "logprobs": 2},
    {"prompt": ids(200, start=7), "max_tokens": 50, "temperature": 0, "logprobs": 1},
    {"prompt": SHARED, "max_tokens": 30, "seed": 3},
    {"prompt": SHARED + ids(90, start=8), "max_tokens": 30, "seed": 4, "n": 2, "top_p": 0.9},
    {"prompt": SHARED + ids(65, start=9), "max_tokens": 30, "repetition_penalty": 1.3, "seed": 5},
    {"prompt": ids(100, start=10), "max_tokens": 9, "seed": 6, "prompt_logprobs": 1},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Iterator[list[object]]:
    """The replies of a server whose engines read and write."""
    with serving(folder, *SIZE) as server:
        url = server.wait_until_ready()
        yield [reply(url, body) for body in REQUESTS]


def all_at_once(url: str, bodies: list[dict[str, object]]) -> list[object]:
    replies: dict[int, object] = {}
    ask = lambda index: replies.__setitem__(index, reply(url, bodies[index]))  # noqa: E731
    for thread in in_threads(len(bodies), ask):
        thread.join(30)
    return [replies.get(index) for index in range(len(bodies))]


def test_replies_are_those_of_engines_that_read_and_write(
    folder: Path, undisturbed: list[object]
) -> None:
    with serving(folder, *SPLIT) as server:
        url = server.wait_until_ready()
        assert len(server.engines()) == 2
        assert [reply(url, body) for body in REQUESTS] == undisturbed
        assert metric(url, "llmserve_handover_requests_total") == 5
        assert metric(url, "llmserve_handover_blocks_total") == 4 + 12 + 8 + 5 + 4
        assert all_at_once(url, REQUESTS) == undisturbed
        assert metric(url, "llmserve_engine_restarts_total") == 0
        server.process.send_signal(signal.SIGTERM)
        assert_clean_end(server, url)


def test_a_trace_tells_of_both_engines_and_no_hit_is_made_up(folder: Path) -> None:
    with serving(folder, *SPLIT) as server:
        url = server.wait_until_ready()
        body = {"prompt": ids(100), "max_tokens": 5, "ignore_eos": True}
        _, data = post(url, body)
        value = json.loads(data)
        (trace,) = json.loads(read(url, f"/requests/{value['id']}/trace"))["prompts"]
        (again,) = json.loads(post(url, {**body, "prompt": ids(98)})[1])["choices"]
    assert again["finish_reason"] == "length"
    kinds = [step["kind"] for step in trace["steps"]]
    assert kinds[:5] == [*["prefill"] * 2, *["handover"] * 2, "prefill"]
    assert set(kinds[5:]) == {"decode"}
    tokens = [step["tokens"] for step in trace["steps"]]
    assert tokens[:5] == [64, 32, 96, 96, 4]
    assert sum(tokens[5:]) == 4
    assert trace["cached_tokens"] == 0, "what was handed over had to be computed"
    assert trace["finish_reasons"] == ["length"]
    assert trace["output_tokens"] == 5


def test_engines_killed_at_every_twelfth_step_change_nothing(
    folder: Path, undisturbed: list[object]
) -> None:
    environment = {"LLMSERVE_FAILPOINTS": "engine.forward=kill@12"}
    with serving(folder, *SPLIT, "--replicas", "2", environment=environment) as server:
        url = server.wait_until_ready()
        for _ in range(20):  # the reader takes twelve steps in one round or in some
            assert all_at_once(url, REQUESTS) == undisturbed
            if "for prompts ended: by signal 9" in server.output:
                break
        assert server.output.count("for prompts ended: by signal 9") >= 1
        assert server.output.count("requests wait") >= 3
        server.process.send_signal(signal.SIGTERM)
        assert_clean_end(server, url)


def test_without_its_reader_a_server_goes_on(folder: Path, undisturbed: list[object]) -> None:
    """Also when the next writer is another loader's: then nothing can be handed over."""
    with serving(folder, *SPLIT) as server:
        url = server.wait_until_ready()
        for _ in range(3):
            kill_reader(server)
            assert all_at_once(url, REQUESTS) == undisturbed
        kill_writer_and_loader(server)
        assert all_at_once(url, REQUESTS) == undisturbed


def kill_reader(server: ServeProcess) -> None:
    """Of the two engines the one that was started last."""
    engines = server.engines()
    os.kill(max(engines, key=lambda one: (one.create_time(), one.pid)).pid, signal.SIGKILL)


def kill_writer_and_loader(server: ServeProcess) -> None:
    """The next writer is another loader's, and shares no memory with the reader."""
    loader = server.loader()
    writer = min(server.engines(), key=lambda one: (one.create_time(), one.pid))
    loader.kill()
    loader.wait(5)
    os.kill(writer.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--record", "log"], 2, "--record cannot be replayed"),
        (["--dtype", "float16"], 1, "engines that share memory with their loader: the native"),
    ],
)
def test_what_cannot_hand_over_is_refused(
    folder: Path, options: list[str], code: int, words: str
) -> None:
    with serving(folder, "--prefill-engines", "1", *options) as server:
        assert server.wait(60) == code, server.output
        assert words in server.output
        assert "Traceback" not in server.output
