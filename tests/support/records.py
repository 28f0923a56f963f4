"""Records of requests with times given by hand."""

from __future__ import annotations

from collections.abc import Sequence

from llmserve.benchmarks.record import RequestRecord


def make_record(
    chunk_times_s: Sequence[float],
    *,
    index: int = 0,
    turn: int = 0,
    origin_s: float = 0.0,
    sent_s: float | None = None,
    tokens: int | None = None,
    prompt_tokens: int | None = 10,
) -> RequestRecord:
    """A finished request; `sent_s` None: sent when it was meant to be."""
    return RequestRecord(
        index=index,
        turn=turn,
        prompt_tokens=prompt_tokens,
        origin_s=origin_s,
        sent_s=origin_s if sent_s is None else sent_s,
        chunk_times_s=list(chunk_times_s),
        completion_tokens=tokens,
        texts=["x"] * len(chunk_times_s),
        finish_reason="length",
    )


def make_failure(kind: str, *, index: int = 0) -> RequestRecord:
    """A request that failed before any token."""
    return RequestRecord(index=index, error_kind=kind, error=f"a failure of kind {kind}")
