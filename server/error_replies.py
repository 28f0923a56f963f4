"""From an error to a reply: one shape, one table of statuses, never more than a kilobyte.

    {"error": {"message": str, "type": str, "param": str | null, "code": int}}

Messages say what was wrong; they quote at most a few characters of what the client sent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus

import orjson
from starlette.responses import Response

from llmserve.errors import (
    EngineDeadError,
    EngineError,
    LLMServeError,
    OverloadedError,
    RequestError,
)
from llmserve.limits import Limits

__all__ = [
    "BodyTooLargeError",
    "DeadlineError",
    "DrainingError",
    "MediaTypeError",
    "NotFoundError",
    "error_body",
    "error_reply",
    "plain_error",
    "status_of",
]

MAX_PARAM_CHARS = 64


class BodyTooLargeError(RequestError):
    """A request body above the limit."""


class MediaTypeError(RequestError):
    """A request body that does not say it is JSON."""


class NotFoundError(RequestError):
    """A model or route that is not here."""


class DrainingError(OverloadedError):
    """The server is about to end and takes no new requests."""


class DeadlineError(LLMServeError):
    """A request that was not done by its deadline."""


# The first class that fits decides.
STATUSES: tuple[tuple[type[LLMServeError], HTTPStatus], ...] = (
    (BodyTooLargeError, HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
    (MediaTypeError, HTTPStatus.UNSUPPORTED_MEDIA_TYPE),
    (NotFoundError, HTTPStatus.NOT_FOUND),
    (RequestError, HTTPStatus.BAD_REQUEST),
    (DrainingError, HTTPStatus.SERVICE_UNAVAILABLE),
    (OverloadedError, HTTPStatus.TOO_MANY_REQUESTS),
    (DeadlineError, HTTPStatus.GATEWAY_TIMEOUT),
    (EngineDeadError, HTTPStatus.SERVICE_UNAVAILABLE),
    (EngineError, HTTPStatus.INTERNAL_SERVER_ERROR),
    (LLMServeError, HTTPStatus.INTERNAL_SERVER_ERROR),
)

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "overloaded_error",
    500: "engine_error",
    503: "unavailable_error",
    504: "timeout_error",
}


def status_of(error: LLMServeError) -> int:
    """The HTTP status of an error."""
    return next(status for kind, status in STATUSES if isinstance(error, kind))


def error_body(limits: Limits, status: int, message: str, param: str | None = None) -> bytes:
    """The reply's JSON, cut to `max_error_bytes` by shortening the message."""
    max_bytes = limits.max_error_bytes
    message = message.encode("utf-8", "replace").decode()
    if param is not None:
        param = param[:MAX_PARAM_CHARS].encode("utf-8", "replace").decode()
    while True:
        kind = TYPES.get(status, "invalid_request_error")
        error = {"message": message, "type": kind, "param": param, "code": status}
        body = orjson.dumps({"error": error})
        if len(body) <= max_bytes or not message:
            return body
        # One character takes at most six bytes of JSON: the loop ends soon.
        message = message[
            : min(len(message) - 1, max(0, len(message) * max_bytes // len(body) - 3))
        ]


def plain_error(
    limits: Limits,
    status: int,
    message: str,
    param: str | None = None,
    *,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An error reply that no exception stands for."""
    body = error_body(limits, status, message, param)
    return Response(body, status, dict(headers or {}), media_type="application/json")


def error_reply(limits: Limits, error: LLMServeError) -> Response:
    """The reply to a request that `error` ended."""
    headers = {}
    if isinstance(error, OverloadedError):
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    param = error.param if isinstance(error, RequestError) else None
    return plain_error(limits, status_of(error), str(error), param, headers=headers)
