"""One OpenAI-compatible server as the load test sees it.

A request is serialized before its send time is taken, and each raw piece is stamped before it is
parsed, so that the client's own work is not the server's latency. No failure of the server raises
out of `complete`: it ends in the record, by kind.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import orjson

from llmserve.errors import LLMServeError

from .http_client import HttpClient, HttpError, Want
from .record import RequestRecord, apply_event, error_message
from .sse import SSEError, SSEParser
from .workload import Prompt

__all__ = ["CHAT_ENDPOINT", "COMPLETIONS_ENDPOINT", "Client", "ServerError", "Target"]

COMPLETIONS_ENDPOINT = "/v1/completions"
CHAT_ENDPOINT = "/v1/chat/completions"

MAX_ERROR_BYTES = 64 << 10
MAX_REPLY_BYTES = 16 << 20
ASK_TIMEOUT_S = 60.0


class ServerError(LLMServeError):
    """The server could not be asked, or answered with an error. `status` is None without one."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where requests go and what they all hold."""

    base_url: str
    """Scheme, host and port, without a path's final slash."""
    endpoint: str = COMPLETIONS_ENDPOINT
    """`COMPLETIONS_ENDPOINT` or `CHAT_ENDPOINT`."""
    model: str = ""
    """Name of the model in requests."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent with each request."""
    body: Mapping[str, object] = field(default_factory=dict)
    """Fields of each request besides model, prompt, length and streaming."""
    include_usage: bool = True
    """Whether to ask for token counts; some servers refuse the question."""
    continuous_usage: bool = False
    """Whether to ask for them in each chunk."""
    request_timeout_s: float = 600.0
    """From a request's send to its end."""

    def request_body(self, prompt: Prompt) -> bytes:
        """JSON of the request for `prompt`."""
        body: dict[str, object] = {"model": self.model}
        if self.endpoint == CHAT_ENDPOINT:
            body["messages"] = [*prompt.history, {"role": "user", "content": prompt.content}]
            body["max_completion_tokens"] = prompt.output_len
        else:
            body["prompt"] = prompt.content
            body["max_tokens"] = prompt.output_len
        body["stream"] = True
        if self.include_usage:
            body["stream_options"] = self._stream_options()
        return orjson.dumps(body | dict(self.body))

    def _stream_options(self) -> dict[str, bool]:
        continuous = {"continuous_usage_stats": True} if self.continuous_usage else {}
        return {"include_usage": True, **continuous}


class Client:
    """Sends requests to one `target`, which may be replaced between requests.

    An asynchronous context manager: it holds the connections. One event loop uses it.
    """

    def __init__(self, target: Target, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.target = target
        self._clock = clock
        self._http = HttpClient(target.base_url, clock=clock)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._http.close()

    async def complete(self, prompt: Prompt, origin_s: float | None = None) -> RequestRecord:
        """Send `prompt` and read the stream to its end.

        `origin_s` is when it was meant to be sent (None: now), on this client's clock.
        """
        target = self.target
        record = RequestRecord(
            index=prompt.index, turn=prompt.turn, prompt_tokens=prompt.num_tokens
        )
        body = target.request_body(prompt)
        head = self._http.head("POST", target.endpoint, target.headers)
        reader = _EventReader(record, most_chunks=2 * prompt.output_len + 16)
        record.sent_s = self._clock()
        record.origin_s = record.sent_s if origin_s is None else origin_s
        try:
            async with asyncio.timeout(target.request_timeout_s):
                await self._http.request(head, body, reader)
        except TimeoutError:
            record.fail("timeout", self._timeout_message(record))
        except OSError as error:
            record.fail("connection", _reason(error))
        except HttpError as error:
            record.fail("garbage", str(error))
        reader.close()
        return record

    async def models(self) -> list[dict[str, object]]:
        """What `/v1/models` lists. Raises `ServerError`."""
        reply = await self._ask("GET", "/v1/models", None)
        data = reply.get("data")
        if not isinstance(data, list):
            raise ServerError(f"{self.target.base_url}/v1/models holds no list of models")
        return [model for model in data if isinstance(model, dict)]

    async def tokenize(self, text: str) -> list[int]:
        """Ids of `text`, no special ones added. Raises `ServerError`."""
        body = {"model": self.target.model, "prompt": text, "add_special_tokens": False}
        tokens = (await self._ask("POST", "/tokenize", body)).get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            raise ServerError(f"{self.target.base_url}/tokenize gives no list of token ids")
        return tokens

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`. Raises `ServerError`."""
        body = {"model": self.target.model, "tokens": list(token_ids)}
        text = (await self._ask("POST", "/detokenize", body)).get("prompt")
        if not isinstance(text, str):
            raise ServerError(f"{self.target.base_url}/detokenize gives no text")
        return text

    async def page(self, path: str, *, timeout_s: float = ASK_TIMEOUT_S) -> bytes:
        """What a GET of `path` answers. Raises `ServerError`."""
        return await self._fetch("GET", path, b"", timeout_s)

    async def _ask(self, method: str, path: str, body: object) -> dict[str, object]:
        """The JSON object that the server answers. Raises `ServerError`."""
        data = b"" if body is None else orjson.dumps(body)
        return _json_object(
            self.target.base_url + path, await self._fetch(method, path, data, ASK_TIMEOUT_S)
        )

    async def _fetch(self, method: str, path: str, body: bytes, timeout_s: float) -> bytes:
        url, reader = self.target.base_url + path, _BodyReader()
        timeout_s = min(timeout_s, self.target.request_timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                head = self._http.head(method, path, self.target.headers)
                await self._http.request(head, body, reader)
        except TimeoutError as error:
            raise ServerError(f"no answer from {url} within {timeout_s:g} s") from error
        except (OSError, HttpError) as error:
            raise ServerError(f"cannot reach {url}: {_reason(error)}") from error
        if reader.status != 200:
            message = _http_message(reader.status, bytes(reader.body))
            raise ServerError(f"{url}: {message}", status=reader.status)
        return bytes(reader.body)

    def _timeout_message(self, record: RequestRecord) -> str:
        limit = f"no end within {self.target.request_timeout_s:g} s"
        if not record.chunk_times_s:
            return f"{limit}: nothing came"
        last_s = self._clock() - record.chunk_times_s[-1]
        return f"{limit}: {len(record.chunk_times_s)} chunks came, the last {last_s:.1f} s ago"


class _BodyReader:
    """Keeps a reply, up to a limit."""

    def __init__(self, limit: int = MAX_REPLY_BYTES) -> None:
        self.status = 0
        self.body = bytearray()
        self._limit = limit

    def take(self, status: int, piece: bytes, now: float) -> Want:
        self.status = status
        self.body += piece[: self._limit - len(self.body)]
        return Want.MORE if len(self.body) < self._limit else Want.STOP

    def end(self, status: int) -> None:
        self.status = status


class _EventReader:
    """Enters the events of a stream, or the error that came instead, into a record."""

    def __init__(self, record: RequestRecord, *, most_chunks: int) -> None:
        self._record = record
        self._most_chunks = most_chunks
        self._parser = SSEParser()
        self._error = _BodyReader(MAX_ERROR_BYTES)

    def take(self, status: int, piece: bytes, now: float) -> Want:
        if status != 200:
            return self._error.take(status, piece, now)
        record = self._record
        try:
            events = self._parser.feed(piece)
        except SSEError as error:
            record.fail("garbage", str(error))
            return Want.STOP
        for event in events:
            apply_event(record, event, now)
            if record.error_kind is not None:
                return Want.STOP
            if record.is_done:
                return Want.NOTHING_MORE
        if len(record.chunk_times_s) > self._most_chunks:
            record.fail("garbage", f"{len(record.chunk_times_s)} chunks and no end in sight")
            return Want.STOP
        return Want.MORE

    def end(self, status: int) -> None:
        self._error.status = status

    def close(self) -> None:
        """Judge what came, once nothing more will."""
        status = self._error.status
        if status not in (0, 200):
            message = _http_message(status, bytes(self._error.body))
            self._record.fail(f"http_{status}", message)
        self._record.close()


def _json_object(url: str, text: bytes) -> dict[str, object]:
    try:
        reply = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ServerError(f"{url} does not answer with JSON: {text[:80]!r}") from error
    if not isinstance(reply, dict):
        raise ServerError(f"{url} does not answer with a JSON object: {text[:80]!r}")
    return reply


def _http_message(status: int, text: bytes) -> str:
    try:
        message = error_message(orjson.loads(text))
    except orjson.JSONDecodeError:
        message = text[:200].decode("utf-8", "replace").strip()
    return f"HTTP {status}: {message}" if message else f"HTTP {status}"


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
