"""Request bodies: counted while they arrive, then parsed more strictly than JSON parsers do.

What two parsers could read differently is refused: duplicate keys, NaN and infinities, lone
surrogates, bytes that are not UTF-8. Nesting is bounded before the parser sees it.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from starlette.requests import Request

from llmserve.errors import RequestError
from llmserve.limits import Limits

from .error_replies import BodyTooLargeError, MediaTypeError

__all__ = ["parse_object", "read_bytes", "read_object"]

# A whole string (or one that never ends: so that it is scanned once), or one bracket.
_TOKENS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


async def read_object(request: Request, limits: Limits) -> dict[str, Any]:
    """The JSON object that a request carries.

    Raises:
        MediaTypeError: the request does not say that it carries JSON.
        BodyTooLargeError: more bytes than the limit; the rest is not read.
        RequestError: no JSON object, or one that is refused.
        ClientDisconnect: the client left before the body's end.
    """
    _check_media_type(request.headers.get("content-type", ""))
    return parse_object(await read_bytes(request, limits.max_body_bytes), limits.max_json_depth)


def _check_media_type(content_type: str) -> None:
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise MediaTypeError("send the request body as JSON, with Content-Type: application/json")


async def read_bytes(request: Request, max_bytes: int) -> bytes:
    """The whole body.

    Raises:
        BodyTooLargeError: more bytes than the limit; the rest is not read.
        ClientDisconnect: the client left before the body's end.
    """
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and len(declared) < 20 and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def _too_large(max_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"the request body is above {max_bytes} bytes, this server's limit")


def parse_object(body: bytes, max_depth: int) -> dict[str, Any]:
    """The object that `body` holds.

    Raises `RequestError` for anything but one well-formed JSON object of at most `max_depth`
    levels, without duplicate keys, NaN, infinities or lone surrogates.
    """
    if not body.strip():
        raise RequestError("the request has no body: send a JSON object")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8 at byte {error.start}") from error
    _check_depth(text, max_depth)
    value = _parse(text)
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object")
    if _SURROGATE.search(text):
        _check_surrogates(value)
    return value


def _check_depth(text: str, max_depth: int) -> None:
    if text.count("[") + text.count("{") <= max_depth:
        return
    depth = 0
    for match in _TOKENS.finditer(text):
        token = match.group()
        if token in ("[", "{"):
            depth += 1
            if depth > max_depth:
                raise RequestError(f"the body is nested deeper than {max_depth} levels")
        elif token in ("]", "}"):
            depth -= 1


def _parse(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        raise RequestError(
            f"the body is not valid JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from error
    except RequestError:
        raise
    except RecursionError as error:
        raise RequestError("the body is nested too deeply") from error
    except ValueError as error:  # Python's bound on the digits of an integer
        raise RequestError("the body holds a number with too many digits") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise RequestError(f"the key {name[:64]!r} occurs twice in one object")
            seen.add(name)
    return result


def _refuse(constant: str) -> NoReturn:
    raise RequestError(f"{constant} is not a JSON number")


def _check_surrogates(value: dict[str, Any]) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError("a string holds half of a surrogate pair (\\ud800-\\udfff)") from error
