"""Anthropic's `/v1/messages`, in its basic text form."""

from __future__ import annotations

import time

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from .answering import answer, converse, head_of
from .messages_api_reply import MessagesFormat
from .messages_api_schemas import MessagesRequest
from .routing import body_of, read_asked
from .server_state import ServerState

__all__ = ["messages_router"]


def messages_router(state: ServerState) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/messages", openapi_extra=body_of(MessagesRequest))
    async def messages(request: Request) -> Response:
        """Answer a conversation."""
        return await _answer(state, request)

    return router


async def _answer(state: ServerState, request: Request) -> Response:
    arrival_time = time.monotonic()
    state.check_open()
    service, asked, card, ignored = await read_asked(state, request, MessagesRequest)
    chat = asked.as_chat()
    generation, (parser,) = await converse(service, request, chat, card, arrival_time)
    num_prompt_tokens = len(generation.requests[0].prompt_token_ids)
    reply = MessagesFormat(head_of(card, generation), parser, num_prompt_tokens=num_prompt_tokens)
    return answer(generation, reply, chat, ignored)
