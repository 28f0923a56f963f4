"""What the routes share: reading a request, and the plain kinds of replies."""

from __future__ import annotations

from typing import Any, TypeVar

import orjson
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from .model_card import ModelCard
from .request_body import read_object
from .schemas import ModelRequest, parse_request
from .server_state import ServerState
from .service import Service

__all__ = ["body_of", "ignored_header", "json_reply", "read_asked"]

MAX_IGNORED_NAMES = 16


R = TypeVar("R", bound=ModelRequest)


def json_reply(value: object) -> Response:
    """A JSON document."""
    return Response(orjson.dumps(value), media_type="application/json")


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI description of a route's body, which the route reads itself."""
    schema = model.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def read_asked(
    state: ServerState, request: Request, kind: type[R]
) -> tuple[Service, R, ModelCard, list[str]]:
    """Who answers, the request, the card of what it names, and the fields that were ignored.

    The service is pinned: a swap from here on does not change the model that answers.

    Raises `RequestError` for a body or a field that cannot be taken, `NotFoundError` for a model
    that is not here, `DrainingError` for one that is not there at the moment.
    """
    body = await read_object(request, state.limits)
    asked, ignored = parse_request(kind, body, ignore_unknown=state.settings.ignore_unknown_fields)
    service, card = state.find(asked.model)
    service.check_open()
    return service.pinned(), asked, card, ignored


def ignored_header(ignored: list[str]) -> dict[str, str]:
    """Names of ignored fields; those that are no plain words are counted, not repeated."""
    plain = [name for name in ignored if name.isascii() and name.isidentifier() and len(name) < 64]
    shown = plain[:MAX_IGNORED_NAMES]
    if len(shown) < len(ignored):
        shown.append(f"and {len(ignored) - len(shown)} more")
    return {"x-llmserve-ignored": ", ".join(shown)} if shown else {}
