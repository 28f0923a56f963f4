"""LoRA adapters as models of their own names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llmserve.checkpoint import Checkpoint
from llmserve.config import ModelConfig
from llmserve.errors import CheckpointError, ConfigError
from llmserve.runners.fake import next_token
from llmserve.server.announcement import describe
from support.adapter_folders import make_adapter_folder
from support.servers import LocalServer, local_server

VOCAB = 320


@pytest.fixture(scope="module")
def config(model_folder: Path) -> ModelConfig:
    return Checkpoint.open(model_folder).config


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, config: ModelConfig) -> dict[str, str]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: str(make_adapter_folder(root / name, config, seed=seed))
        for seed, name in enumerate(("first", "second"))
    }


@pytest.fixture(scope="module")
def adapted(model_folder: Path, folders: dict[str, str]) -> Iterator[LocalServer]:
    with local_server(model_folder, engine={"adapters": folders}) as server:
        yield server


def greedy(prompt: list[int], count: int, adapter_id: int) -> str:
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids, VOCAB, adapter_id=adapter_id))
    return str(ids[-1])


def test_they_are_listed_after_the_model_with_their_parent(
    adapted: LocalServer, folders: dict[str, str]
) -> None:
    base, first, second = adapted.get("/v1/models").json()["data"]
    assert (base["id"], base["parent"]) == ("tiny", None)
    assert [model["id"] for model in (first, second)] == ["first", "second"]
    assert [model["parent"] for model in (first, second)] == ["tiny", "tiny"]
    assert [model["root"] for model in (first, second)] == list(folders.values())
    assert adapted.get("/v1/models/second").json() == second
    for digest in ("fingerprint", "system_fingerprint"):
        assert len({model[digest] for model in (base, first, second)}) == 3


@pytest.mark.parametrize(("name", "adapter_id"), [("tiny", 0), ("first", 1), ("second", 2)])
def test_the_name_decides_who_answers(adapted: LocalServer, name: str, adapter_id: int) -> None:
    # The last of the tokens is asked for as a stop id, which replies name by its number.
    last = greedy([5, 6], 3, adapter_id)
    body = {"prompt": [5, 6], "model": name, "max_tokens": 3, "stop_token_ids": [int(last)]}
    reply = adapted.complete(**body).json()
    assert reply["choices"][0]["stop_reason"] == int(last)
    assert reply["model"] == name
    card = adapted.get(f"/v1/models/{name}").json()
    assert reply["system_fingerprint"] == card["system_fingerprint"]
    chat = {"messages": [{"role": "user", "content": "x"}], "model": name, "max_tokens": 1}
    assert adapted.post("/v1/chat/completions", chat).json()["model"] == name


def test_they_do_not_share_a_prefix(adapted: LocalServer) -> None:
    for name in ("tiny", "first", "second"):
        reply = adapted.complete(prompt=[9] * 60, model=name, max_tokens=1).json()
        assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_other_names_are_unknown(adapted: LocalServer) -> None:
    for path in ("/v1/completions", "/tokenize"):
        reply = adapted.post(path, {"prompt": "x", "model": "third"})
        assert reply.status == 404
        assert reply.json()["error"]["param"] == "model"
        assert adapted.post(path, {"prompt": "x", "model": "first"}).status == 200
    assert adapted.get("/v1/models/third").status == 404


def test_they_are_announced(adapted: LocalServer, folders: dict[str, str]) -> None:
    said = [text for label, text in describe(adapted.state, "u") if label == "adapter"]
    assert said == [f"{name}, from {folder}" for name, folder in folders.items()]


def test_what_cannot_be_served_is_refused_before_anything_runs(
    model_folder: Path, config: ModelConfig, folders: dict[str, str], tmp_path: Path
) -> None:
    first = folders["first"]
    with (
        pytest.raises(ConfigError, match="'tiny' is the model's name"),
        local_server(model_folder, engine={"adapters": {"tiny": first}}),
    ):
        pass
    with (
        pytest.raises(CheckpointError, match="none"),
        local_server(model_folder, engine={"adapters": {"a": str(tmp_path / "none")}}),
    ):
        pass
    too_deep = make_adapter_folder(tmp_path / "deep", replace(config, num_layers=3))
    with (
        pytest.raises(CheckpointError, match=r"layers\.2"),
        local_server(model_folder, engine={"adapters": {"a": str(too_deep)}}),
    ):
        pass
