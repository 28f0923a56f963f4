"""The application: routes, what they raise, and the layers around them."""

from __future__ import annotations

import logging

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp

from llmserve import __version__
from llmserve.errors import LLMServeError

from .admin_routes import admin_router
from .classify_routes import classify_router
from .embeddings_routes import embeddings_router
from .error_replies import error_reply, plain_error
from .messages_api_routes import messages_router
from .openai_routes import openai_router
from .ops_routes import ops_router
from .page import page_router
from .protection import Guard
from .responses_routes import responses_router
from .score_routes import score_router
from .server_state import ServerState
from .swap import Swapper

__all__ = ["create_app", "protect"]

_log = logging.getLogger("llmserve.server")


def create_app(state: ServerState, swapper: Swapper) -> FastAPI:
    """Every route, without the protection around them."""
    # Swagger's and ReDoc's pages load scripts from elsewhere, which the page's policy forbids.
    app = FastAPI(
        title="llmserve",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # Newer versions have telemetry of their own: it looks for a receiver at every request, and
        # would send one the bodies that it refused. Ours is `trace_export.py`.
        telemetry={
            "tracing": False,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
        },
    )
    routers = (
        openai_router(state),
        responses_router(state),
        messages_router(state),
        embeddings_router(state),
        score_router(state),
        classify_router(state),
        ops_router(state),
        admin_router(state, swapper),
        page_router(),
    )
    for router in routers:
        app.include_router(router)
    _handle_errors(app, state)
    return app


def protect(app: ASGIApp, state: ServerState) -> ASGIApp:
    """`app` behind the guard, and open to the allowed origins if there are any."""
    guarded: ASGIApp = Guard(app, state)
    if not state.settings.allowed_origins:
        return guarded
    return CORSMiddleware(
        guarded,
        allow_origins=state.settings.allowed_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type", "x-api-key", "x-request-id"],
        expose_headers=["x-request-id", "x-llmserve-ignored", "retry-after"],
    )


def _handle_errors(app: FastAPI, state: ServerState) -> None:
    """One shape for whatever a route, the router or a defect raises."""

    async def on_llmserve_error(_request: Request, error: Exception) -> Response:
        assert isinstance(error, LLMServeError)
        return error_reply(state.limits, error)

    async def on_http_error(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = {404: "there is no such route", 405: "this route does not take that method"}
        return plain_error(
            state.limits,
            error.status_code,
            message.get(error.status_code, str(error.detail)),
            headers=error.headers,
        )

    async def on_client_left(_request: Request, _error: Exception) -> Response:
        return Response(status_code=499)  # nobody is there to read it

    async def on_defect(_request: Request, error: Exception) -> Response:
        _log.error("a route failed: %s", type(error).__name__)
        return plain_error(state.limits, 500, "the server failed on this request")

    app.add_exception_handler(LLMServeError, on_llmserve_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ClientDisconnect, on_client_left)
    app.add_exception_handler(Exception, on_defect)
