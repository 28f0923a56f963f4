from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.errors import (
    CheckpointError,
    EngineDeadError,
    EngineError,
    LLMServeError,
    OverloadedError,
    PromptTooLongError,
    RequestError,
)
from llmserve.limits import Limits
from llmserve.server.error_replies import (
    BodyTooLargeError,
    DeadlineError,
    DrainingError,
    MediaTypeError,
    NotFoundError,
    error_body,
    error_reply,
)


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (RequestError("x", param="n"), 400, "invalid_request_error"),
        (PromptTooLongError(prompt_tokens=9, limit=8), 400, "invalid_request_error"),
        (NotFoundError("x", param="model"), 404, "not_found_error"),
        (BodyTooLargeError("x"), 413, "invalid_request_error"),
        (MediaTypeError("x"), 415, "invalid_request_error"),
        (OverloadedError("x", retry_after_s=2.2), 429, "overloaded_error"),
        (DrainingError("x", retry_after_s=5), 503, "unavailable_error"),
        (EngineDeadError("x"), 503, "unavailable_error"),
        (EngineError("x"), 500, "engine_error"),
        (DeadlineError("x"), 504, "timeout_error"),
        (CheckpointError("x"), 500, "engine_error"),
    ],
)
def test_every_error_has_its_status(error: LLMServeError, status: int, kind: str) -> None:
    reply = error_reply(Limits(), error)
    body = json.loads(reply.body)["error"]
    assert reply.status_code == status == body["code"]
    assert body["type"] == kind
    assert body["message"] == str(error)
    assert body["param"] == getattr(error, "param", None)
    expected = "3" if isinstance(error, OverloadedError) and status == 429 else None
    if expected:
        assert reply.headers["retry-after"] == expected


@given(
    st.text(st.characters(), max_size=3000),
    st.none() | st.text(st.characters(), max_size=300),
    st.integers(200, 1024),
)
def test_bodies_stay_within_their_limit_and_are_json(
    message: str, param: str | None, size: int
) -> None:
    limits = Limits(max_error_bytes=max(size, 600))
    body = error_body(limits, 400, message, param)
    assert len(body) <= limits.max_error_bytes
    assert json.loads(body)["error"]["code"] == 400
