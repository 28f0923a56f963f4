"""OpenAI's routes: completions, chat completions and the list of models."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from .answering import answer, converse, head_of, make_generation, wants
from .chat_reply import ChatFormat
from .chat_schemas import ChatRequest
from .completion_reply import CompletionFormat, PromptPart
from .routing import body_of, json_reply, read_asked
from .schemas import CompletionRequest
from .server_state import ServerState
from .service import Service

__all__ = ["openai_router"]

DEFAULT_MAX_TOKENS = 16
"""What a completion gets that does not say `max_tokens`, as in OpenAI's API."""


def openai_router(state: ServerState) -> APIRouter:
    """The routes under /v1."""
    router = APIRouter()

    @router.post("/v1/completions", openapi_extra=body_of(CompletionRequest))
    async def completions(request: Request) -> Response:
        """Continue one or several prompts."""
        return await _complete(state, request)

    @router.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        return await _chat(state, request)

    @router.get("/v1/models")
    async def models() -> Response:
        """The models that requests may name."""
        models = [card.as_dict(name) for card in state.cards for name in card.names]
        return json_reply({"object": "list", "data": models})

    @router.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> Response:
        """One model's facts."""
        _, card = state.find(model_id)
        return json_reply(card.with_records(model_id))

    return router


async def _chat(state: ServerState, request: Request) -> Response:
    arrival_time = time.monotonic()
    state.check_open()
    service, asked, card, ignored = await read_asked(state, request, ChatRequest)
    generation, parsers = await converse(service, request, asked, card, arrival_time)
    reply = ChatFormat(
        head_of(card, generation),
        service.tokenizer,
        parsers=parsers,
        with_logprobs=asked.num_logprobs() is not None,
        most_calls=None if asked.parallel_tool_calls else 1,
        shows_reasoning=asked.include_reasoning,
        continuous_usage=wants(asked, "continuous_usage_stats"),
    )
    return answer(generation, reply, asked, ignored)


async def _complete(state: ServerState, request: Request) -> Response:
    arrival_time = time.monotonic()
    state.check_open()
    service, asked, card, ignored = await read_asked(state, request, CompletionRequest)
    params = asked.sampling_params()
    prompts = await service.prompts.read(asked.prompt, add_special_tokens=asked.add_special_tokens)
    if params.max_tokens is None:
        params = replace(params, max_tokens=_default_budget(service, prompts))
    generation = make_generation(service, request, asked, prompts, params, card, arrival_time)
    reply = CompletionFormat(
        head_of(card, generation),
        service.tokenizer,
        prompts=_prompt_parts(service, asked, prompts),
        n=params.n,
        num_logprobs=params.logprobs,
        echoes_logprobs=asked.echoes_logprobs,
        num_prompt_logprobs=asked.prompt_logprobs,
        continuous_usage=wants(asked, "continuous_usage_stats"),
    )
    return answer(generation, reply, asked, ignored)


def _default_budget(service: Service, prompts: Sequence[list[int]]) -> int:
    """The default, or less where the context ends before it: nobody asked for that many."""
    room = service.engine.config.max_seq_len - max(map(len, prompts))
    return max(1, min(DEFAULT_MAX_TOKENS, room))


def _prompt_parts(
    service: Service, asked: CompletionRequest, prompts: Sequence[list[int]]
) -> list[PromptPart]:
    """The prompts as their choices tell of them; a text is echoed as it was sent."""
    parts = []
    for given, token_ids in zip(asked.prompt, prompts, strict=True):
        text = given if isinstance(given, str) else service.tokenizer.decode(token_ids)
        parts.append(PromptPart(token_ids=token_ids, echo=text if asked.echo else ""))
    return parts
