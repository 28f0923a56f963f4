"""The door of a cluster: hands each request to a server, and to another if that one is lost.

A request changes nothing but its own reply, so it can always be asked again. Replies that are not
streams are passed on when they are whole. A stream that had begun is resumed where it can be
(`cluster_resume.py`), and else ends with an error. Keys, limits and all else are the servers';
what only says something about one server, or changes one, is refused.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from llmserve.errors import EngineDeadError, EngineError, RequestError
from llmserve.limits import Limits
from llmserve.sampling import MAX_SEED

from .auth import Access, KeyRing
from .cluster_replica import ClusterRequest
from .cluster_resume import MODEL_ROUTES, Resumption, can_resume, with_seed
from .error_replies import error_body, error_reply, plain_error, status_of
from .replies import done_event, event
from .request_body import parse_object, read_bytes
from .responses_reply import named_event

__all__ = ["MAX_TRIES", "Ask", "ClusterFront"]

MAX_TRIES = 4
"""Servers that one request may be handed to, each after the loss of the one before."""

KEPT = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "root_path",
        "query_string", "headers", "client", "server")  # fmt: skip

ABOUT_ONE_SERVER = ("/admin/", "/kv-blocks", "/metrics", "/requests/")

Ask = Callable[[ClusterRequest], AsyncGenerator[list[Message]]]
"""Hands a request to some server; gives its messages."""

_log = logging.getLogger("llmserve.server")


class ClusterFront:
    """An ASGI application."""

    def __init__(
        self, ask: Ask, *, keys: KeyRing, limits: Limits, lost: tuple[type[Exception], ...]
    ) -> None:
        """`lost`: what `ask` raises when the server is gone and another may be asked."""
        self._ask = ask
        self._keys = keys
        self._limits = limits
        self._lost = lost

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        limits, body = self._limits, b""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        # A stranger's body is not read: the server that is asked refuses without it.
        if self._keys.check({**scope, "path": path}).access is Access.GRANTED:
            if path.startswith(ABOUT_ONE_SERVER):
                message = "this route is about one server, and here are several"
                await plain_error(limits, 404, message)(scope, receive, send)
                return
            try:
                async with asyncio.timeout(limits.request_timeout_s):
                    body = await read_bytes(Request(scope, receive), limits.max_body_bytes)
            except TimeoutError:
                await plain_error(limits, 408, "the body did not come in time")(
                    scope, receive, send
                )
                return
            except RequestError as error:
                await error_reply(limits, error)(scope, receive, send)
                return
            except ClientDisconnect:
                return
        body, resumes = self._prepared(path, body)
        request = ClusterRequest({name: scope[name] for name in KEPT if name in scope}, body)
        exchange = _Exchange(send, limits, path, resumes=resumes)
        answering = asyncio.create_task(self._answer(request, exchange))
        watcher = asyncio.create_task(_cancel_when_left(receive, answering))
        try:
            await asyncio.wait([answering])
        finally:
            watcher.cancel()
            answering.cancel()
        if not answering.cancelled():
            answering.result()

    def _prepared(self, path: str, body: bytes) -> tuple[bytes, bool]:
        """The body as servers get it, and whether its stream can be resumed."""
        if path not in MODEL_ROUTES:
            return body, False
        try:
            fields = parse_object(body, self._limits.max_json_depth)
        except RequestError:
            return body, False  # the server says what is wrong with it
        if not can_resume(path, fields):
            return body, False
        try:
            return with_seed(body, fields, secrets.randbelow(MAX_SEED + 1)), True
        except orjson.JSONEncodeError:  # an integer above 64 bits: the server refuses it
            return body, False

    async def _answer(self, request: ClusterRequest, exchange: _Exchange) -> None:
        for _ in range(MAX_TRIES):
            try:
                async with aclosing(self._ask(request)) as answer:
                    async for messages in answer:
                        await exchange.take(messages)
                return
            except self._lost as error:
                _log.warning("a server was lost with a request: %s", type(error).__name__)
                if not exchange.begin_again():
                    break
            except EngineError as error:
                await exchange.fail(error)
                return
        await exchange.fail(EngineDeadError("the server that had the request was lost"))


class _Exchange:
    """One reply on its way to the client, over all servers that are asked for it."""

    def __init__(self, send: Send, limits: Limits, path: str, *, resumes: bool) -> None:
        self._send = send
        self._limits = limits
        self._path = path
        self._resumes = resumes
        self._start: Message | None = None
        self._held = bytearray()
        self._sent = bytearray()
        self._has_begun = False
        self._resumption: Resumption | None = None

    def begin_again(self) -> bool:
        """Get ready for another server's answer; whether one can be of use."""
        if self._has_begun and not self._resumes:
            return False
        self._start = None
        self._held.clear()
        self._resumption = Resumption(bytes(self._sent)) if self._has_begun else None
        return True

    async def take(self, messages: list[Message]) -> None:
        """Pass on what can be.

        Raises:
            EngineError: it is no continuation of what the client has.
        """
        for message in messages:
            if message["type"] == "http.response.start":
                self._start = message
            elif self._is_stream():
                await self._pass_on(message)
            else:
                await self._hold(message)

    async def fail(self, error: EngineError) -> None:
        """End the reply with an error, in a stream as its last event."""
        status = status_of(error)
        body = error_body(self._limits, status, str(error))
        if not self._has_begun:
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
            ]
            await self._send({"type": "http.response.start", "status": status, "headers": headers})
        elif self._path in MODEL_ROUTES:
            body = event(body) + done_event
        else:
            body = named_event("error", orjson.loads(body))
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    def _is_stream(self) -> bool:
        assert self._start is not None, "an application begins with the reply's start"
        return (b"content-type", b"text/event-stream") in self._start["headers"]

    async def _hold(self, message: Message) -> None:
        self._held += message.get("body", b"")
        if message.get("more_body", False):
            return
        if self._has_begun:  # the replay was refused
            raise EngineDeadError("the server that had the request was lost, and no other took it")
        assert self._start is not None
        await self._send(self._start)
        await self._send({"type": "http.response.body", "body": bytes(self._held)})

    async def _pass_on(self, message: Message) -> None:
        chunk = message.get("body", b"")
        if not self._has_begun:
            self._has_begun = True
            assert self._start is not None
            await self._send(self._start)
        elif self._resumption is not None:
            chunk = self._resumption.rest(chunk)
        if self._resumes:
            self._sent += chunk
        has_more = message.get("more_body", False)
        if chunk or not has_more:
            body = {"type": "http.response.body", "body": chunk, "more_body": has_more}
            await self._send(body)


async def _live(receive: Receive, send: Send) -> None:
    """Nothing is to be done at the start or the end."""
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


async def _cancel_when_left(receive: Receive, answering: asyncio.Task[None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    answering.cancel()
