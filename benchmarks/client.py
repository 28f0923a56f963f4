"""One OpenAI-compatible server as the load test sees it. The only door to aiohttp.

A request is serialized before its send time is taken, and each raw chunk is stamped before it is
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

from llmserve.errors import LLMServeError, MissingDependencyError

from .record import RequestRecord, apply_event, error_message
from .sse import SSEError, SSEParser
from .workload import Prompt

try:
    import aiohttp
except ImportError as error:
    raise MissingDependencyError(
        "aiohttp", extra="bench", feature="llmserve bench serve"
    ) from error

__all__ = ["CHAT_ENDPOINT", "COMPLETIONS_ENDPOINT", "Client", "ServerError", "Target"]

COMPLETIONS_ENDPOINT = "/v1/completions"
CHAT_ENDPOINT = "/v1/chat/completions"

CONNECT_TIMEOUT_S = 10.0
# Below uvicorn's 5 s: a connection taken up just as the server closes it would fail the request.
KEEP_ALIVE_S = 3.0
# What may follow [DONE]: the end of the chunked body, which lets the connection be used again.
TRAILER_TIMEOUT_S = 1.0
MAX_ERROR_BYTES = 64 << 10
MAX_REPLY_BYTES = 16 << 20


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
    request_timeout_s: float = 600.0
    """From a request's send to its end."""

    def request_body(self, prompt: Prompt) -> bytes:
        """JSON of the request for `prompt`."""
        body: dict[str, object] = {"model": self.model}
        if self.endpoint == CHAT_ENDPOINT:
            body["messages"] = [{"role": "user", "content": prompt.content}]
            body["max_completion_tokens"] = prompt.output_len
        else:
            body["prompt"] = prompt.content
            body["max_tokens"] = prompt.output_len
        body["stream"] = True
        if self.include_usage:
            body["stream_options"] = {"include_usage": True}
        return orjson.dumps(body | dict(self.body))


class Client:
    """Sends requests to one `target`, which may be replaced between requests.

    An asynchronous context manager: it holds the connections. One event loop uses it.
    """

    def __init__(self, target: Target, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.target = target
        self._clock = clock
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            headers={"Accept-Encoding": "identity"},  # a packed stream arrives in lumps
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._open_session().close()

    async def complete(self, prompt: Prompt, origin_s: float | None = None) -> RequestRecord:
        """Send `prompt` and read the stream to its end.

        `origin_s` is when it was meant to be sent (None: now), on this client's clock.
        """
        record = RequestRecord(index=prompt.index, prompt_tokens=prompt.num_tokens)
        body = self.target.request_body(prompt)
        record.sent_s = self._clock()
        record.origin_s = record.sent_s if origin_s is None else origin_s
        try:
            await self._stream(body, record, most_chunks=2 * prompt.output_len + 16)
        except aiohttp.ConnectionTimeoutError:
            record.fail("connection", f"no connection within {CONNECT_TIMEOUT_S:g} s")
        except TimeoutError:
            record.fail("timeout", self._timeout_message(record))
        except (aiohttp.ClientError, OSError) as error:
            record.fail("connection", _reason(error))
        except SSEError as error:
            record.fail("garbage", str(error))
        record.close()
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

    async def _stream(self, body: bytes, record: RequestRecord, *, most_chunks: int) -> None:
        headers = {"Content-Type": "application/json", **self.target.headers}
        url = self.target.base_url + self.target.endpoint
        timeout = _timeout(self.target.request_timeout_s)
        session = self._open_session()
        async with session.post(url, data=body, headers=headers, timeout=timeout) as response:
            if response.status != 200:
                text = await _read_most(response.content, MAX_ERROR_BYTES)
                record.fail(f"http_{response.status}", _http_message(response.status, text))
                return
            await self._read_events(response.content, record, most_chunks)

    async def _read_events(
        self, content: aiohttp.StreamReader, record: RequestRecord, most_chunks: int
    ) -> None:
        parser = SSEParser()
        async for chunk in content.iter_any():
            now = self._clock()
            for event in parser.feed(chunk):
                apply_event(record, event, now)
                if not record.is_success:
                    return
                if record.is_done:
                    await _read_trailer(content)
                    return
            if len(record.chunk_times_s) > most_chunks:
                record.fail("garbage", f"{len(record.chunk_times_s)} chunks and no end in sight")
                return

    async def _ask(self, method: str, path: str, body: object) -> dict[str, object]:
        """The JSON object that the server answers. Raises `ServerError`."""
        url = self.target.base_url + path
        data = None if body is None else orjson.dumps(body)
        headers = {"Content-Type": "application/json", **self.target.headers}
        timeout = _timeout(min(60.0, self.target.request_timeout_s))
        try:
            async with self._open_session().request(
                method, url, data=data, headers=headers, timeout=timeout
            ) as response:
                status = response.status
                text = await _read_most(response.content, MAX_REPLY_BYTES)
        except TimeoutError as error:
            raise ServerError(f"no answer from {url} within {timeout.total:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerError(f"cannot reach {url}: {_reason(error)}") from error
        if status != 200:
            raise ServerError(f"{url}: {_http_message(status, text)}", status=status)
        return _json_object(url, text)

    def _timeout_message(self, record: RequestRecord) -> str:
        limit = f"no end within {self.target.request_timeout_s:g} s"
        if not record.chunk_times_s:
            return f"{limit}: nothing came"
        last_s = self._clock() - record.chunk_times_s[-1]
        return f"{limit}: {len(record.chunk_times_s)} chunks came, the last {last_s:.1f} s ago"

    def _open_session(self) -> aiohttp.ClientSession:
        assert self._session is not None, "the client is used outside its `async with`"
        return self._session


def _timeout(total_s: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=total_s, sock_connect=min(total_s, CONNECT_TIMEOUT_S))


async def _read_most(content: aiohttp.StreamReader, limit: int) -> bytes:
    """The body, or its first `limit` bytes where it is longer."""
    body = bytearray()
    async for chunk in content.iter_any():
        body += chunk
        if len(body) >= limit:
            break
    return bytes(body[:limit])


async def _read_trailer(content: aiohttp.StreamReader) -> None:
    try:
        async with asyncio.timeout(TRAILER_TIMEOUT_S):
            async for _ in content.iter_any():
                pass
    except (TimeoutError, aiohttp.ClientError, OSError):
        return  # the answer is whole; only the connection cannot be used again


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
