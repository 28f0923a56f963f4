"""OpenAI's routes: completions, chat completions and the list of models."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import orjson
from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from llmserve.sampling import SamplingParams

from .chat_reply import ChatFormat
from .chat_schemas import ChatRequest
from .completion_reply import CompletionFormat, PromptPart
from .engine_requests import make_requests
from .generation import Generation
from .message_parts import MessageParser, ReasoningParser
from .model_card import ModelCard
from .prompts import ChatPrompt
from .replies import ReplyFormat, ReplyHead
from .request_body import read_object
from .schemas import CompletionRequest, GenerationRequest, parse_request
from .service import Service
from .streaming import EventStream, WholeReply
from .tools_calls import CallParser, JsonCallParser, MarkedCallParser

__all__ = ["body_of", "json_reply", "openai_router"]

DEFAULT_MAX_TOKENS = 16
"""What a completion gets that does not say `max_tokens`, as in OpenAI's API."""

MAX_IGNORED_NAMES = 16

R = TypeVar("R", bound=GenerationRequest)


def openai_router(service: Service) -> APIRouter:
    """The routes under /v1."""
    router = APIRouter()

    @router.post("/v1/completions", openapi_extra=body_of(CompletionRequest))
    async def completions(request: Request) -> Response:
        """Continue one or several prompts."""
        return await _complete(service, request)

    @router.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        return await _chat(service, request)

    @router.get("/v1/models")
    async def models() -> Response:
        """The models that requests may name."""
        cards = (service.card, *service.adapter_cards)
        models = [card.as_dict(name) for card in cards for name in card.names]
        return json_reply({"object": "list", "data": models})

    @router.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> Response:
        """One model's facts."""
        return json_reply(service.card_named(model_id).as_dict(model_id))

    return router


def json_reply(value: object) -> Response:
    """A JSON document."""
    return Response(orjson.dumps(value), media_type="application/json")


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI description of a route's body, which the route reads itself."""
    schema = model.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def _complete(service: Service, request: Request) -> Response:
    arrival_time = time.monotonic()
    service.check_open()
    asked, card, ignored = await _read(service, request, CompletionRequest)
    params = asked.sampling_params()
    prompts = await service.prompts.read(asked.prompt, add_special_tokens=asked.add_special_tokens)
    if params.max_tokens is None:
        params = replace(params, max_tokens=_default_budget(service, prompts))
    generation = _generation(service, request, asked, prompts, params, card, arrival_time)
    reply = CompletionFormat(
        _head(card, generation),
        service.tokenizer,
        prompts=_prompt_parts(service, asked, prompts),
        n=params.n,
        num_logprobs=params.logprobs,
        echoes_logprobs=asked.echoes_logprobs,
        num_prompt_logprobs=asked.prompt_logprobs,
        continuous_usage=_wants(asked, "continuous_usage_stats"),
    )
    return _answer(generation, reply, asked, ignored)


async def _chat(service: Service, request: Request) -> Response:
    arrival_time = time.monotonic()
    service.check_open()
    asked, card, ignored = await _read(service, request, ChatRequest)
    params = asked.sampling_params()
    prompt = await service.prompts.read_messages(
        asked.messages,
        tools=asked.offered_tools,
        add_generation_prompt=asked.starts_turn,
        continues_last=asked.continue_final_message,
        variables=asked.chat_template_kwargs,
    )
    ids = [prompt.token_ids]
    generation = _generation(service, request, asked, ids, params, card, arrival_time)
    reply = ChatFormat(
        _head(card, generation),
        service.tokenizer,
        parsers=[message_parser(service, asked, prompt) for _ in range(generation.num_choices)],
        with_logprobs=params.logprobs is not None,
        most_calls=None if asked.parallel_tool_calls else 1,
        shows_reasoning=asked.include_reasoning,
        continuous_usage=_wants(asked, "continuous_usage_stats"),
    )
    return _answer(generation, reply, asked, ignored)


def message_parser(service: Service, asked: ChatRequest, prompt: ChatPrompt) -> MessageParser:
    """What takes one choice's text apart, as far as the request and the model have parts."""
    calls: CallParser | None = None
    if asked.must_call:
        return MessageParser(calls=JsonCallParser())
    if asked.offered_tools:
        calls = MarkedCallParser() if service.prompts.marks_calls else JsonCallParser()
    reasoning: ReasoningParser | None = None
    if service.prompts.marks_reasoning:
        reasoning = ReasoningParser(is_open=prompt.opens_reasoning)
    return MessageParser(reasoning=reasoning, calls=calls)


def _generation(
    service: Service,
    request: Request,
    asked: GenerationRequest,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    card: ModelCard,
    arrival_time: float,
) -> Generation:
    requests = make_requests(
        asked,
        prompts,
        params,
        tenant=request.state.tenant,
        shares_prefix_cache=service.settings.shares_prefix_cache,
        adapter=card.adapter,
        arrival_time=arrival_time,
        limits=service.limits,
    )
    return Generation(
        service.engine,
        service.tokenizer,
        service.metrics,
        requests=requests,
        limits=service.limits,
    )


async def _read(
    service: Service, request: Request, kind: type[R]
) -> tuple[R, ModelCard, list[str]]:
    """The request, the model it names, and the fields that were ignored."""
    body = await read_object(request, service.limits)
    asked, ignored = parse_request(
        kind, body, ignore_unknown=service.settings.ignore_unknown_fields
    )
    return asked, service.card_named(asked.model), ignored


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


def _head(card: ModelCard, generation: Generation) -> ReplyHead:
    return ReplyHead(
        request_id=generation.requests[0].request_id,
        model=card.names[0],
        system_fingerprint=card.system_fingerprint,
    )


def _wants(asked: GenerationRequest, option: str) -> bool:
    return asked.stream_options is not None and getattr(asked.stream_options, option) is True


def _answer(
    generation: Generation, reply: ReplyFormat, asked: GenerationRequest, ignored: list[str]
) -> Response:
    headers = _ignored_header(ignored)
    if asked.stream:
        include_usage = _wants(asked, "include_usage")
        return EventStream(generation, reply, headers, include_usage=include_usage)
    return WholeReply(generation, reply, headers)


def _ignored_header(ignored: list[str]) -> dict[str, str]:
    """Names of ignored fields; those that are no plain words are counted, not repeated."""
    plain = [name for name in ignored if name.isascii() and name.isidentifier() and len(name) < 64]
    shown = plain[:MAX_IGNORED_NAMES]
    if len(shown) < len(ignored):
        shown.append(f"and {len(ignored) - len(shown)} more")
    return {"x-llmserve-ignored": ", ".join(shown)} if shown else {}
