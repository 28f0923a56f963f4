"""What later engines of a model are told."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from llmserve.server.engine_settings import EngineSettings
from llmserve.server.engine_setup import settings_at
from llmserve.server.engine_source import EngineSource
from llmserve.server.messages import Fork
from support.engines import make_config


def test_an_engine_is_told_its_replicas_place(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Fork] = []
    ready: Any = SimpleNamespace(config=make_config(), info="info")

    async def fork(command: Fork, progress: object) -> Any:
        told.append(command)
        answer = asyncio.get_running_loop().create_future()
        answer.set_result(ready)
        return SimpleNamespace(ready=answer)

    loader: Any = SimpleNamespace(is_gone=False, fork=fork)
    monkeypatch.setattr("llmserve.server.engine_source.stamp_of", lambda settings: None)

    async def start_two() -> None:
        settings = EngineSettings(model=str(tmp_path), runner="torch")
        source = EngineSource(settings, ready, loader, stall_s=1.0)
        await source.start(2)
        await source.start(1)

    asyncio.run(start_two())
    assert [(one.number, one.place) for one in told] == [(1, 2), (2, 1)]


def test_a_place_has_devices_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    settings = EngineSettings(model="m", runner="torch", device="cuda", tensor_parallel_size=2)
    assert [settings_at(settings, place).device for place in range(3)] == [
        "cuda:0", "cuda:2", "cuda:0",
    ]  # fmt: skip
