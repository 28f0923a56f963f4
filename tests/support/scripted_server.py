"""An OpenAI-shaped server that does what a test tells it, good or bad, in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

from aiohttp import web

Script = Callable[["Reply", dict[str, Any]], Awaitable[None]]
MODEL = {"id": "scripted", "object": "model", "root": "scripted", "vocab_size": 100}


class Reply:
    """One request's answer, written by the script piece by piece."""

    def __init__(self, request: web.Request, number: int) -> None:
        self.request = request
        self.number = number
        """How many requests came before this one."""
        self.response: web.StreamResponse | None = None

    async def send(self, data: bytes) -> None:
        """Write raw bytes, after the head of an event stream if they are the first."""
        if self.response is None:
            self.response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await self.response.prepare(self.request)
        await self.response.write(data)

    async def event(self, value: object) -> None:
        """Write one event of JSON."""
        await self.send(b"data: " + json.dumps(value).encode() + b"\n\n")

    async def token(self, text: str, finish_reason: str | None = None) -> None:
        """Write one token chunk in the form of the route."""
        chat = "chat" in self.request.path
        piece = {"delta": {"content": text}} if chat else {"text": text}
        await self.event({"choices": [{"index": 0, **piece, "finish_reason": finish_reason}]})

    async def end(self, prompt_tokens: int | None, completion_tokens: int) -> None:
        """Write usage (unless `prompt_tokens` is None) and the end mark."""
        if prompt_tokens is not None:
            usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
            await self.event({"choices": [], "usage": usage})
        await self.send(b"data: [DONE]\n\n")

    def refuse(self, status: int, message: str) -> None:
        """Answer with an error in OpenAI's shape instead of a stream."""
        self.response = web.json_response({"error": {"message": message}}, status=status)

    def cut(self) -> None:
        """Drop the connection, as a server that died."""
        assert self.request.transport is not None
        self.request.transport.abort()


async def well(reply: Reply, body: dict[str, Any]) -> None:
    """Answer with every token asked for, at once, and usage if asked."""
    count = body.get("max_tokens") or body["max_completion_tokens"]
    prompt = body.get("prompt")
    for index in range(count):
        await reply.token(f"t{index} ", "length" if index == count - 1 else None)
    asked = bool(body.get("stream_options"))
    await reply.end(len(prompt) if asked and isinstance(prompt, list) else None, count)


class ScriptedServer:
    """Serves `script` on a port of its own; `requests` are the bodies and headers that came."""

    def __init__(
        self,
        script: Script = well,
        *,
        model: dict[str, Any] | None = None,
        words: bool = False,
        metrics: str | None = None,
    ) -> None:
        """`words`: offer `/tokenize` and `/detokenize`, by which token 7 is the word `w7`.

        `metrics`: the page at `/metrics`, each `{n}` in which is the number of requests so far.
        """
        self._script = script
        self._model = MODEL if model is None else model
        self._words = words
        self._page = metrics
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._is_up = threading.Event()
        self._stop = asyncio.Event()
        self.requests: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.base_url = ""

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [body for body, _ in self.requests]

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._is_up.wait(10)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._main())

    async def _main(self) -> None:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_get("/v1/models", self._models)
        for route in ("/v1/completions", "/v1/chat/completions"):
            app.router.add_post(route, self._generate)
        if self._words:
            app.router.add_post("/tokenize", self._tokenize)
            app.router.add_post("/detokenize", self._detokenize)
        if self._page is not None:
            app.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        self.base_url = f"http://{host}:{port}"
        self._is_up.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._model]})

    async def _metrics(self, request: web.Request) -> web.Response:
        assert self._page is not None
        return web.Response(text=self._page.replace("{n}", str(len(self.requests))))

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        reply = Reply(request, len(self.requests))
        self.requests.append((body, dict(request.headers)))
        await self._script(reply, body)
        assert reply.response is not None
        return reply.response

    async def _tokenize(self, request: web.Request) -> web.Response:
        words = (await request.json())["prompt"].split()
        ids = [int(word[1:]) if word[1:].isdigit() else len(word) for word in words]
        return web.json_response({"tokens": ids, "count": len(ids)})

    async def _detokenize(self, request: web.Request) -> web.Response:
        ids = (await request.json())["tokens"]
        return web.json_response({"prompt": " ".join(f"w{token_id}" for token_id in ids)})
