"""Routes that change what the server serves; their keys have the scope `admin`."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from .request_body import read_object
from .routing import body_of, json_reply
from .schemas import LoadModelRequest, parse_request
from .server_state import ServerState
from .swap import Swapper

__all__ = ["admin_router"]


def admin_router(state: ServerState, swapper: Swapper) -> APIRouter:
    """The routes under /admin."""
    router = APIRouter()

    @router.post("/admin/models/load", openapi_extra=body_of(LoadModelRequest))
    async def load_model(request: Request) -> Response:
        """Serve another model folder in the place of a model, or that one's folder anew."""
        state.check_open()
        body = await read_object(request, state.limits)
        asked, _ = parse_request(LoadModelRequest, body)
        return json_reply(asdict(await swapper.swap(asked.model, name=asked.name)))

    return router
