"""One server of a cluster: the whole application over its engines, without a socket of its own.

Whoever carries requests between machines brings them here (`ray_app.py`). Engines are kept and
replaced as in any server; they end when the process does that this runs in.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Self

from starlette.types import ASGIApp, Message

from llmserve.errors import EngineDeadError

from .app import create_app, protect
from .assembly import serve_model
from .available_memory import available_bytes
from .engine_launch import EngineLaunch
from .models_start import open_models, start_state
from .server_state import ServerState
from .settings import ServerSettings
from .swap import Swapper

__all__ = ["ClusterReplica", "ClusterRequest"]


@dataclass(frozen=True, slots=True)
class ClusterRequest:
    """One HTTP request on its way between machines."""

    scope: dict[str, Any]
    """ASGI's, as far as it is plain data."""
    body: bytes


class ClusterReplica:
    """A server's application; open it with `start`."""

    def __init__(self, state: ServerState) -> None:
        """A server over engines that serve."""
        self._state = state
        self._app: ASGIApp = protect(create_app(state, Swapper(state, serve_model)), state)
        self._running: set[asyncio.Task[None]] = set()

    @classmethod
    async def start(cls, settings: ServerSettings) -> Self:
        """Load the models and return when they are served.

        Raises:
            CheckpointError: a model folder cannot be used.
            ConfigError: a setting cannot be used, or the models do not fit.
            EngineStartError: an engine could not load its model.
        """
        with contextlib.ExitStack() as stack:
            launches = [stack.enter_context(EngineLaunch()) for _ in settings.models]
            launches[0].load(settings.models[0].engine)
            models = await asyncio.to_thread(open_models, settings, available_bytes())
            state = await start_state(settings, models, launches)
            for launch in launches:
                launch.release()
        return cls(state)

    def check_health(self) -> None:
        """Raise `EngineDeadError` when no engine will ever serve again."""
        cause = self._state.cause_of_death
        if cause is not None:
            raise EngineDeadError(cause)

    async def answer(self, request: ClusterRequest) -> AsyncGenerator[list[Message]]:
        """The application's messages, those that wait together in one list.

        Closing the generator early tells the application that the client left.
        """
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        has_left = asyncio.Event()
        body = [request.body]

        async def receive() -> Message:
            if body:
                return {"type": "http.request", "body": body.pop(), "more_body": False}
            await has_left.wait()
            return {"type": "http.disconnect"}

        task = asyncio.ensure_future(self._app(dict(request.scope), receive, messages.put))
        self._running.add(task)  # it ends soon after the client has left, but not at once
        task.add_done_callback(self._running.discard)
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            has_ended = False
            while not has_ended:
                taken = [await messages.get()]
                while not messages.empty():
                    taken.append(messages.get_nowait())
                has_ended = None in taken
                if told := [message for message in taken if message is not None]:
                    yield told
            await task
        finally:
            has_left.set()
