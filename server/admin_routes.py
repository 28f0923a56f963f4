"""Routes that change what the server serves; their keys have the scope `admin`."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from .request_body import read_object
from .routing import body_of, json_reply
from .schemas import LoadModelRequest, parse_request
from .service import Service
from .swap import Swapper

__all__ = ["admin_router"]


def admin_router(service: Service, swapper: Swapper) -> APIRouter:
    """The routes under /admin."""
    router = APIRouter()

    @router.post("/admin/models/load", openapi_extra=body_of(LoadModelRequest))
    async def load_model(request: Request) -> Response:
        """Serve another model folder in the place of the present one, or its folder anew."""
        service.check_open()
        body = await read_object(request, service.limits)
        asked, _ = parse_request(LoadModelRequest, body)
        return json_reply(asdict(await swapper.swap(asked.model)))

    return router
