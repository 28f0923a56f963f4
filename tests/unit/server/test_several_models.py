"""Requests go to the model that they name, and what is counted is counted by model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmserve.errors import ConfigError
from llmserve.limits import Limits
from llmserve.server.assembly import check_names
from llmserve.server.engine_settings import EngineSettings
from llmserve.server.prompts import PromptReader
from llmserve.server.served_model import open_model
from llmserve.server.settings import ModelSettings
from support.models import make_model_folder
from support.servers import LocalServer, call, local_server


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return make_model_folder(root / "first"), make_model_folder(root / "second", seed=1)


@pytest.fixture
def pair(folders: tuple[Path, Path]) -> Iterator[LocalServer]:
    first, second = folders
    with local_server(first, more=[second]) as server:
        yield server


def test_a_request_is_answered_by_the_model_it_names(pair: LocalServer) -> None:
    replies = {
        name: pair.complete(model=name, prompt=[5, 6], max_tokens=4).json()
        for name in ("first", "second")
    }
    assert [reply["model"] for reply in replies.values()] == ["first", "second"]
    prints = {reply["system_fingerprint"] for reply in replies.values()}
    assert len(prints) == 2
    assert [entry["id"] for entry in pair.get("/v1/models").json()["data"]] == ["first", "second"]
    assert pair.get("/v1/models/second").json()["root"].endswith("second")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/embeddings", {"input": "x"}),
        ("/v1/score", {"text_1": "x", "text_2": "y"}),
        ("/v1/rerank", {"query": "x", "documents": ["y"]}),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [5]}),
    ],
)
def test_every_route_goes_by_the_name(pair: LocalServer, path: str, body: dict[str, Any]) -> None:
    assert pair.post(path, {"model": "second", **body}).status == 200
    assert pair.post(path, {"model": "third", **body}).status == 404
    nameless = pair.post(path, body)
    assert nameless.status == 400
    assert nameless.json()["error"]["param"] == "model"
    assert "first, second" in nameless.json()["error"]["message"]


def test_a_request_that_names_a_model_is_counted_as_its(pair: LocalServer) -> None:
    pair.complete(model="second", prompt=[5, 6, 7], max_tokens=2)
    text = pair.get("/metrics").body.decode()
    assert 'llmserve_prompt_tokens_total{model_name="first"} 0.0' in text
    assert 'llmserve_prompt_tokens_total{model_name="second"} 3.0' in text
    assert text.count("# TYPE llmserve_prompt_tokens_total counter") == 1, "one family of both"


def test_health_and_readiness_are_of_all_models_or_of_one(pair: LocalServer) -> None:
    assert pair.get("/health").json() == {"status": "ok"}
    pair.engine.trouble = "it is stuck"
    for path in ("/health", "/ready"):
        assert (reply := pair.get(path)).status == 200, "the other serves"
        assert reply.json() == {"status": "degraded"}
        assert pair.get(path + "?model=first").status == 503
        assert pair.get(path + "?model=second").json() == {"status": "ok"}
        assert pair.get(path + "?model=third").status == 404


def test_a_model_that_is_gone_for_good_is_missed_by_its_clients_alone(pair: LocalServer) -> None:
    pair.run(_lose(pair))
    assert pair.complete(model="first", prompt="x", max_tokens=2).status == 503
    assert pair.complete(model="second", prompt="x", max_tokens=2).status == 200
    assert pair.state.cause_of_death is None


async def _lose(server: LocalServer) -> None:
    server.engine.lose("for a test")


def test_two_models_of_one_name_are_refused(folders: tuple[Path, Path]) -> None:
    settings = [
        ModelSettings(engine=EngineSettings(model=str(folder), runner="fake"), names=("same",))
        for folder in folders
    ]
    models = [open_model(one, Limits()) for one in settings]
    with pytest.raises(ConfigError, match=r"two models go by the name 'same'.* NAME=.*second"):
        check_names(settings, models)


def test_what_was_read_when_a_swap_begins_to_drain_is_told_to_try_again(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It passed the open check, but must neither be lost nor keep the old model from its end."""
    with local_server(folders[0]) as server:
        is_read, may_go_on = server.run(_events())
        read = PromptReader.read

        async def slow_read(self: PromptReader, *args: Any, **kwargs: Any) -> list[list[int]]:
            ids = await read(self, *args, **kwargs)
            is_read.set()
            await may_go_on.wait()
            return ids

        monkeypatch.setattr(PromptReader, "read", slow_read)
        for path, body in (
            ("/v1/completions", b'{"prompt": "x", "stream": true}'),
            ("/v1/embeddings", b'{"input": "x"}'),
        ):
            reply = server.run(_swapped_meanwhile(server, path, body, is_read, may_go_on))
            assert reply.status == 503, reply.body
            assert int(reply.headers["retry-after"]) >= 1
        server.wait_idle()


async def _events() -> tuple[asyncio.Event, asyncio.Event]:
    return asyncio.Event(), asyncio.Event()


async def _swapped_meanwhile(
    server: LocalServer,
    path: str,
    body: bytes,
    is_read: asyncio.Event,
    may_go_on: asyncio.Event,
) -> Any:
    """The reply to a request that is read before its model is closed, and handed over after."""
    is_read.clear()
    may_go_on.clear()
    server.service.is_loading = False
    asking = asyncio.create_task(call(server.app, "POST", path, body))
    await is_read.wait()
    server.service.close()
    await server.engine.requests.wait_idle()
    may_go_on.set()
    return await asking
