from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmserve.engine.config import SpeculationConfig
from llmserve.runners.protocol import CacheGroup
from llmserve.server.announcement import announce, describe
from llmserve.server.auth import Key, KeyRing, RouteScope
from llmserve.server.model_card import ModelCard
from llmserve.server.server_state import ServerState
from support.servers import LocalServer, local_server

KEYS = KeyRing([Key.of("long-enough-key", {RouteScope.USER})])


def lines(state: ServerState) -> dict[str, str]:
    return dict(describe(state, "http://localhost:1"))


def with_card(server: LocalServer, card: ModelCard) -> ServerState:
    service = replace(server.service, model=replace(server.service.model, card=card))
    return replace(server.state, services=(service,))


def lines_of(folder: Path, **settings: Any) -> dict[str, str]:
    with local_server(folder, **settings) as server:
        return lines(server.state)


def test_it_names_sizes_and_the_way_to_call(server: LocalServer) -> None:
    said = lines(server.state)
    assert said["KV cache"] == "0.0 MiB of int64: 256 blocks of 16 tokens"
    assert said["prefixes"] == "computed once, shared by all requests"
    assert said["context"] == "256 tokens, up to 16 sequences a step"
    assert said["steps"] == "up to 512 tokens, as asked"
    assert said["API"] == "http://localhost:1/v1"
    assert "Bearer" not in said["try"]
    assert not {"policy", "guesses", "adapter", "recording"} & said.keys()


def test_cache_groups_are_told_apart_by_their_windows(server: LocalServer) -> None:
    service = server.service
    groups = (
        CacheGroup(num_layers=1, window=None, bytes_per_token=1 << 16),
        CacheGroup(num_layers=5, window=64, bytes_per_token=1 << 17),
    )
    card = replace(
        service.card,
        info=replace(service.card.info, cache_groups=groups),
        config=replace(service.card.config, num_blocks=(8, 4)),
    )
    said = list(describe(with_card(server, card), "http://localhost:1"))
    first = next(index for index, (label, _) in enumerate(said) if label == "KV cache")
    assert [text for _, text in said[first : first + 3]] == [
        "16.0 MiB of int64: 12 blocks of 16 tokens",
        "8.0 MiB, 8 blocks for 1 layer",
        "8.0 MiB, 4 blocks for 5 layers, a window of 64 tokens",
    ]


def test_it_says_what_the_prefix_cache_does(model_folder: Path) -> None:
    said = lines_of(model_folder, keys=KEYS)
    assert said["prefixes"] == "computed once, each API key's apart"
    assert "Bearer KEY" in said["try"]
    said = lines_of(model_folder, keys=KEYS, shares_prefix_cache=True)
    assert said["prefixes"] == "computed once, shared by all requests"
    said = lines_of(model_folder, engine={"has_prefix_cache": False})
    assert said["prefixes"] == "computed anew for every request"


@pytest.mark.parametrize(
    ("seconds", "measured"), [(0.0472, "47"), (0.1234, "123"), (0.00481, "4.8"), (0.00001, "0.0")]
)
def test_it_says_how_the_size_of_a_step_was_found(
    server: LocalServer, seconds: float, measured: str
) -> None:
    config = replace(server.service.card.config, full_step_s=seconds, max_batched_tokens=384)
    card = replace(server.service.card, config=config)
    said = lines(with_card(server, card))
    assert said["steps"] == f"up to 384 tokens: {measured} ms measured"


def test_it_says_how_large_steps_are_while_nobody_decodes(server: LocalServer) -> None:
    config = replace(
        server.service.card.config,
        full_step_s=0.04, max_batched_tokens=384, max_prefill_tokens=1024, far_token_weight=2.0,
    )  # fmt: skip
    said = lines(with_card(server, replace(server.service.card, config=config)))
    assert said["steps"] == (
        "up to 384 tokens, 192 at the end of a long prompt, 1024 while nobody decodes: "
        "40 ms measured"
    )


def test_it_says_where_many_requests_make_a_step_larger(server: LocalServer) -> None:
    config = server.service.card.config
    config = replace(config, max_batched_tokens=2 * config.max_num_seqs - 1, full_step_s=None)
    said = lines(with_card(server, replace(server.service.card, config=config)))
    asked = f"up to {config.max_batched_tokens} tokens or two for each request"
    assert said["steps"] == f"{asked}, as asked"


def test_it_tells_of_policy_guesses_and_recording(model_folder: Path, tmp_path: Path) -> None:
    log = str(tmp_path / "steps.log")
    engine = {
        "policy": "fair",
        "tenant_weights": {"t": 2.5},
        "speculation": SpeculationConfig(method="ngram", num_draft_tokens=5),
        "record": log,
    }
    said = lines_of(model_folder, engine=engine)
    assert said["policy"] == "fair among API keys, weights 2.5, others 1"
    assert said["guesses"] == (
        "up to 5 tokens ahead while it pays, by what followed the same 2 to 4 tokens"
    )
    assert said["recording"] == f"to {log}, prompts and answers too"
    assert lines_of(model_folder, engine={"policy": "priority"})["policy"].startswith("priority")


def test_it_tells_of_a_draft_model(server: LocalServer, monkeypatch: Any) -> None:
    service = server.service
    speculation = SpeculationConfig(method="draft", num_draft_tokens=3, is_always_on=True)
    config = replace(service.card.config, speculation=speculation, num_blocks=(64,))
    info = replace(
        service.card.info,
        num_parameters=1234,
        cache_groups=(CacheGroup(num_layers=1, window=None, bytes_per_token=1 << 10),),
    )
    monkeypatch.setattr(service.engine, "draft_info", info)
    said = lines(with_card(server, replace(service.card, config=config)))
    assert said["guesses"].startswith("up to 3 tokens ahead always, by the model ")
    assert "(1,234 parameters, 1.0 MiB of KV cache)" in said["guesses"]


def test_it_is_printed_in_two_columns(server: LocalServer, monkeypatch: Any) -> None:
    printed: list[str] = []

    class Terminal:
        def print(self, text: str, **_: object) -> None:
            printed.append(text)

    monkeypatch.setattr("llmserve.server.announcement.console", Terminal)
    announce(server.state, "http://localhost:1")
    assert "API        http://localhost:1/v1" in printed
