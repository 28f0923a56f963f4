"""How a generation becomes an HTTP reply, whole or as server-sent events.

Both kinds watch for the client's leaving and then abort what it asked for. The status line waits
for the first token, so what goes wrong before it gets a status of its own.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llmserve.engine.request import FinishReason
from llmserve.errors import LLMServeError
from llmserve.limits import Limits

from .error_replies import DeadlineError, error_body, error_reply, status_of
from .generation import Generation, Update
from .rate_budgets import Account
from .replies import ReplyFormat

__all__ = ["EngineReply", "EngineWork", "EventStream", "WholeReply"]


class EngineWork(Protocol):
    """What a request has the engine do."""

    limits: Limits

    @property
    def request_id(self) -> str:
        """Of its first request to the engine, which its reply carries."""

    @property
    def num_tokens(self) -> int:
        """Tokens used so far, read and written."""

    def start(self) -> None:
        """Hand it to the engine."""

    def close(self) -> None:
        """Abort what has not ended. Idempotent."""


class EngineReply(Response, ABC):
    """A reply that begins some work, lasts as long as it does, and ends it in every case."""

    def __init__(self, work: EngineWork, headers: Mapping[str, str]) -> None:
        super().__init__(headers=dict(headers))
        self._work = work
        self._limits = work.limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        account: Account = scope["state"]["account"]
        scope["state"]["engine_request_id"] = self._work.request_id
        watcher = asyncio.create_task(self._close_when_left(receive))
        try:
            account.open()
            self._work.start()
            # In a task of its own: each token resumes these few frames, not those of the whole
            # application around them, whose memory is not in the caches between two steps.
            await asyncio.create_task(self._run(send))
        except LLMServeError as error:  # nothing was sent yet
            await error_reply(self._limits, error)(scope, receive, send)
        finally:
            watcher.cancel()
            self._work.close()
            account.settle(self._work.num_tokens)

    @abstractmethod
    async def _run(self, send: Send) -> None:
        """Send the reply."""

    async def _send_json(self, body: bytes, send: Send) -> None:
        headers = [
            *(item for item in self.raw_headers if item[0] != b"content-length"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _close_when_left(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._work.close()


class WholeReply(EngineReply):
    """One JSON document, when every choice has ended."""

    def __init__(
        self, generation: Generation, reply: ReplyFormat, headers: Mapping[str, str]
    ) -> None:
        super().__init__(generation, headers)
        self._generation = generation
        self._reply = reply

    async def _run(self, send: Send) -> None:
        generation = self._generation
        choices: list[list[Update]] = [[] for _ in range(generation.num_choices)]
        while not generation.is_done:
            for update in await generation.updates():
                choices[update.index].append(update)
        if any(updates[-1].delta.finish_reason is FinishReason.TIMEOUT for updates in choices):
            raise DeadlineError("the request was not done by its deadline")
        await self._send_json(self._reply.whole(choices, generation.usage), send)


class EventStream(EngineReply):
    """Server-sent events: one for each token of each choice, then `[DONE]`."""

    def __init__(
        self,
        generation: Generation,
        reply: ReplyFormat,
        headers: Mapping[str, str],
        *,
        include_usage: bool,
    ) -> None:
        """With `include_usage` the totals are sent in an event of their own, before the end."""
        super().__init__(generation, headers)
        self._generation = generation
        self._reply = reply
        self._include_usage = include_usage

    async def _run(self, send: Send) -> None:
        """Raises what goes wrong before the first event; tells what goes wrong after it."""
        generation, reply = self._generation, self._reply
        has_begun = False
        try:
            while not generation.is_done:
                updates = await generation.updates()
                usage = generation.usage if reply.continuous_usage else None
                if events := b"".join([reply.chunk(update, usage) for update in updates]):
                    if not has_begun:
                        await self._send_head(send)
                        has_begun = True
                    await send({"type": "http.response.body", "body": events, "more_body": True})
            end = reply.closing(generation.usage, include_usage=self._include_usage)
        except LLMServeError as error:
            if not has_begun:
                raise
            end = reply.failure(error_body(self._limits, status_of(error), str(error)))
        if not has_begun:
            await self._send_head(send)
        await send({"type": "http.response.body", "body": end, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _send_head(self, send: Send) -> None:
        headers = [
            *(item for item in self.raw_headers if item[0] != b"content-length"),
            (b"content-type", b"text/event-stream"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
