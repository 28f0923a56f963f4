"""An engine process on its way: what it is told, what it is not, and that it ends with us."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TypeVar

import pytest

from llmserve.server.engine_launch import API_KEY_VARIABLE, EngineLaunch
from llmserve.server.engine_settings import EngineSettings
from llmserve.server.messages import (
    Event,
    Failed,
    Fork,
    FrameDecoder,
    Ready,
    encode_frame,
    event_decoder,
    loader_event_decoder,
)

E = TypeVar("E")


def first_event(launch: EngineLaunch) -> Event:
    """Have an engine forked, and wait for what it says first."""
    ours, theirs = socket.socketpair()
    with theirs:
        socket.send_fds(launch.connection, [encode_frame(Fork(0))], [theirs.fileno()])
    with ours:
        return read_event(ours, event_decoder())


def read_event(connection: socket.socket, decoder: FrameDecoder[E]) -> E:
    connection.settimeout(20)
    while True:
        data = connection.recv(1 << 16)
        assert data, "it ended without a word"
        for event in decoder.feed(data):
            return event


def settings(folder: Path) -> EngineSettings:
    return EngineSettings(
        model=str(folder), runner="fake", max_batched_tokens=64, cache_bytes=1 << 20
    )


def test_it_loads_serves_and_ends_with_the_launch(model_folder: Path) -> None:
    with EngineLaunch() as launch:
        launch.load(settings(model_folder))
        assert isinstance(first_event(launch), Ready)
        assert launch.process.poll() is None
    assert launch.process.poll() is not None


def test_why_it_failed_is_read_after_it_has_gone(tmp_path: Path) -> None:
    with EngineLaunch() as launch:
        launch.load(settings(tmp_path / "none"))
        assert launch.process.wait(20) == 1
        event = read_event(launch.connection, loader_event_decoder())
    assert isinstance(event, Failed)
    assert "none" in event.message


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="environments are in /proc")
def test_it_does_not_get_the_key(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "a-long-secret")
    monkeypatch.setenv("ANOTHER_VARIABLE", "seen")
    with EngineLaunch() as launch:
        launch.load(settings(model_folder))
        first_event(launch)  # it runs our code, with its own environment
        environment = Path(f"/proc/{launch.process.pid}/environ").read_bytes()
    assert b"a-long-secret" not in environment
    assert b"ANOTHER_VARIABLE=seen" in environment
