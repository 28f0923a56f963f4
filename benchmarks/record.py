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
    turn: int = 0
    """Its place in its conversation."""
    prompt_tokens: int | None = None
    """Tokens of the prompt as the server counted them, or else as it was made; None: unknown."""
    origin_s: float = 0.0
    """When it was meant to be sent: latency counts from here."""
    sent_s: float = 0.0
    """When it really was sent."""
    chunk_times_s: list[float] = field(default_factory=list)
    """Arrival of each token chunk."""
    told_tokens: list[int | None] = field(default_factory=list)
    """Tokens in each of them as the server told; None: it did not."""
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
    def is_told(self) -> bool:
        """Whether the server told what each chunk holds, and its total agrees."""
        told = sum(count or 0 for count in self.told_tokens)
        return 0 < told == self.output_tokens

    @property
    def chunk_tokens(self) -> list[int]:
        """Tokens in each token chunk; they add up to `output_tokens`.

        As the server told. Where it did not, one each, as far as there are tokens; more tokens than
        chunks are spread evenly.
        """
        if self.is_told:
            return [count or 0 for count in self.told_tokens]
        chunks, tokens = len(self.chunk_times_s), self.output_tokens
        if tokens <= chunks:
            return [1] * tokens + [0] * (chunks - tokens)
        return [tokens * (i + 1) // chunks - tokens * i // chunks for i in range(chunks)]

    @property
    def itls_s(self) -> list[float]:
        """Gaps between neighbouring tokens, all of which arrive with their chunk.

        So k tokens in one chunk make one gap to the token before them and k - 1 gaps of 0, and
        the mean of all gaps is the time per token.
        """
        arrivals = [
            time_s
            for time_s, count in zip(self.chunk_times_s, self.chunk_tokens, strict=True)
            for _ in range(count)
        ]
        return [later - earlier for earlier, later in pairwise(arrivals)]

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
        before = record.completion_tokens
        _apply_usage(record, chunk.get("usage"))
        choice = _first_choice(record, chunk.get("choices"))
        if choice is not None:
            _apply_choice(record, choice, now, told=_told_tokens(record, choice, before))


def error_message(body: object) -> str:
    """The message of an error reply, nested (`error.message`) or not."""
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:500]


def _first_choice(record: RequestRecord, choices: object) -> dict[str, object] | None:
    if not choices:
        return None
    choice = choices[0] if isinstance(choices, list) else None
    if isinstance(choice, dict):
        return choice
    record.fail("garbage", f"choices is {str(choices)[:80]!r}, not a list of objects")
    return None


def _apply_choice(
    record: RequestRecord, choice: dict[str, object], now: float, *, told: int | None
) -> None:
    finish_reason = choice.get("finish_reason")
    text = _text_of(choice)
    if text is None and not finish_reason:
        return  # announces the role
    record.chunk_times_s.append(now)
    record.told_tokens.append(told)
    if text:
        record.texts.append(text)
    if finish_reason:
        record.finish_reason = str(finish_reason)


def _told_tokens(
    record: RequestRecord, choice: dict[str, object], before: int | None
) -> int | None:
    """Tokens of a chunk: by its ids, its log-probabilities, or the usage so far."""
    if isinstance(ids := choice.get("token_ids"), list):
        return len(ids)
    if isinstance(logprobs := choice.get("logprobs"), dict):
        listed = logprobs.get("tokens") or logprobs.get("content")
        if isinstance(listed, list):
            return len(listed)
    is_one_total = before is None and bool(record.chunk_times_s)  # told once, at the end
    if record.completion_tokens == before or is_one_total:
        return None
    return max(0, (record.completion_tokens or 0) - (before or 0))


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
