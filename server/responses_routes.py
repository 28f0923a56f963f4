"""OpenAI's `/v1/responses`, in its basic text form; nothing is stored."""

from __future__ import annotations

import time

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from .answering import answer, converse, head_of
from .replies import Json
from .responses_reply import ResponsesFormat
from .responses_schemas import ResponsesRequest
from .routing import body_of, read_asked
from .server_state import ServerState

__all__ = ["responses_router"]


def responses_router(state: ServerState) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/responses", openapi_extra=body_of(ResponsesRequest))
    async def responses(request: Request) -> Response:
        """Answer a text or a conversation."""
        return await _respond(state, request)

    return router


async def _respond(state: ServerState, request: Request) -> Response:
    arrival_time = time.monotonic()
    state.check_open()
    service, asked, card, ignored = await read_asked(state, request, ResponsesRequest)
    chat = asked.as_chat()
    generation, (parser,) = await converse(service, request, chat, card, arrival_time)
    repeated: Json = {
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "store": False,
        "tool_choice": "auto",
        "tools": [],
        "metadata": {},
    }
    reply = ResponsesFormat(head_of(card, generation), parser, repeated)
    return answer(generation, reply, chat, ignored)
