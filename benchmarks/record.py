"""What is known of one request: times, counts, text, and how it ended.

The client fills a `RequestRecord` while the stream comes in, through `apply_event`; `metrics.py`
reads it afterwards. Nothing here knows of sockets or clocks: times are given.

Definitions (those of `vllm bench serve`; docs/benchmarks.md). A *token chunk* is an event with a
non-empty `choices`, text or not: an end token has no text. The one exception is a chat chunk that
only announces the role: it carries no token, and a server may send it before it has one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import orjson

from .sse import ServerEvent

__all__ = ["RequestRecord", "apply_event", "error_message"]

# Ends that mean the server gave up, in llmserve and in vLLM.
FAILED_FINISHES = frozenset({"abort", "error", "timeout"})


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One request as the client saw it. Times are seconds of one clock (`time.perf_counter`)."""

    index: int
    """Its place in the workload."""
    prompt_tokens: int | None = None
    """Tokens of the prompt as the server counted them, or else as it was made; None: unknown."""
    origin_s: float = 0.0
    """When it was meant to be sent: latency counts from here."""
    sent_s: float = 0.0
    """When it really was sent."""
    chunk_times_s: list[float] = field(default_factory=list)
    """Arrival of each token chunk."""
    completion_tokens: int | None = None
    """As the server counted them in `usage`; None: it did not say."""
    texts: list[str] = field(default_factory=list)
    """Pieces of the answer."""
    finish_reason: str | None = None
    is_done: bool = False
    """Whether `[DONE]` came."""
    error_kind: str | None = None
    """None for success; else `connection`, `timeout`, `http_<status>`, `garbage`, `server`
    (it reported an error in the stream) or `incomplete`."""
    error: str = ""

    @property
    def is_success(self) -> bool:
        """Whether the answer came whole."""
        return self.error_kind is None

    @property
    def output_tokens(self) -> int:
        """Tokens generated: the server's count, or one for each token chunk."""
        if self.completion_tokens is not None:
            return self.completion_tokens
        return len(self.chunk_times_s)

    @property
    def client_queue_s(self) -> float:
        """Time it waited in the client, for its turn or for the client itself."""
        return self.sent_s - self.origin_s

    @property
    def ttft_s(self) -> float:
        """Time to first token, from `origin_s`. Only where a token came."""
        return self.chunk_times_s[0] - self.origin_s

    @property
    def e2e_s(self) -> float:
        """Time to the last token chunk, from `origin_s`. Only where a token came."""
        return self.chunk_times_s[-1] - self.origin_s

    @property
    def itls_s(self) -> list[float]:
        """Gaps between neighbouring token chunks; several tokens in one chunk make one gap."""
        times = self.chunk_times_s
        return [later - earlier for earlier, later in pairwise(times)]

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for fewer than two tokens."""
        if self.output_tokens < 2:
            return None
        return (self.chunk_times_s[-1] - self.chunk_times_s[0]) / (self.output_tokens - 1)

    def fail(self, kind: str, error: str) -> None:
        """Record how it failed; the first failure stands."""
        if self.error_kind is None:
            self.error_kind, self.error = kind, error

    def close(self) -> None:
        """Judge a stream that has ended: what came before counts only if the end came too."""
        if self.finish_reason in FAILED_FINISHES:
            self.fail("server", f"the server ended the request as {self.finish_reason!r}")
        elif not self.chunk_times_s:
            self.fail("garbage", "the reply held no event with a token")
        elif self.finish_reason is None and not self.is_done:
            self.fail(
                "incomplete",
                f"the stream ended after {len(self.chunk_times_s)} chunks "
                "without finish_reason or [DONE]",
            )


def apply_event(record: RequestRecord, event: ServerEvent, now: float) -> None:
    """Enter one event, which arrived at `now`, into `record`; what it cannot be, fails it."""
    if event.data == b"[DONE]":
        record.is_done = True
        return
    try:
        chunk = orjson.loads(event.data)
    except orjson.JSONDecodeError:
        record.fail("garbage", f"an event is not JSON: {_excerpt(event.data)}")
        return
    if not isinstance(chunk, dict):
        record.fail("garbage", f"an event is no JSON object: {_excerpt(event.data)}")
    elif chunk.get("error") is not None or event.name == b"error":
        record.fail("server", error_message(chunk))
    else:
        _apply_usage(record, chunk.get("usage"))
        _apply_choices(record, chunk.get("choices"), now)


def error_message(body: object) -> str:
    """The message of an error reply, nested (`error.message`) or not."""
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:500]


def _apply_choices(record: RequestRecord, choices: object, now: float) -> None:
    if choices is None or choices == []:
        return
    choice = choices[0] if isinstance(choices, list) else None
    if not isinstance(choice, dict):
        record.fail("garbage", f"choices is {str(choices)[:80]!r}, not a list of objects")
        return
    finish_reason = choice.get("finish_reason")
    text = _text_of(choice)
    if text is None and not finish_reason:
        return  # announces the role
    record.chunk_times_s.append(now)
    if text:
        record.texts.append(text)
    if finish_reason:
        record.finish_reason = str(finish_reason)


def _text_of(choice: dict[str, object]) -> str | None:
    """The text a choice adds; None for a chat chunk with nothing but the role."""
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return str(choice.get("text") or "")
    parts = [delta.get(name) for name in ("reasoning", "reasoning_content", "content")]
    text = "".join(part for part in parts if isinstance(part, str))
    is_role_only = "role" in delta and not text and not delta.get("tool_calls")
    return None if is_role_only else text


def _apply_usage(record: RequestRecord, usage: object) -> None:
    if not isinstance(usage, dict):
        return
    if _is_count(usage.get("completion_tokens")):
        record.completion_tokens = usage["completion_tokens"]
    if _is_count(usage.get("prompt_tokens")):
        record.prompt_tokens = usage["prompt_tokens"]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _excerpt(data: bytes) -> str:
    text = data[:80].decode("utf-8", "replace")
    return repr(text + ("…" if len(data) > 80 else ""))
