"""From a request that was read to a reply that runs: what the generating routes share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from llmserve.sampling import SamplingParams

from .chat_schemas import ChatRequest
from .engine_requests import make_requests
from .generation import Generation
from .message_parts import MessageParser, ReasoningParser
from .model_card import ModelCard
from .prompts import ChatPrompt
from .replies import ReplyFormat, ReplyHead
from .routing import ignored_header
from .schemas import GenerationRequest
from .service import Service
from .streaming import EventStream, WholeReply
from .tools_calls import CallParser, JsonCallParser, MarkedCallParser

__all__ = ["answer", "converse", "head_of", "make_generation", "wants"]


def make_generation(
    service: Service,
    request: Request,
    asked: GenerationRequest,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    card: ModelCard,
    arrival_time: float,
) -> Generation:
    """The request's choices on their way through the engine; nothing is queued yet.

    Raises `RequestError` for what can never be served.
    """
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
    service.traces.begin(requests, block_size=service.engine.config.block_size)
    return Generation(
        service.engine,
        service.tokenizer,
        service.metrics,
        requests=requests,
        limits=service.limits,
        read_timing=partial(service.traces.timing_of, requests[0].request_id, request.state.tenant),
        tells_timing=asked.timing,
    )


async def converse(
    service: Service, request: Request, asked: ChatRequest, card: ModelCard, arrival_time: float
) -> tuple[Generation, list[MessageParser]]:
    """The answer to a conversation, and what takes each choice's text apart.

    Raises `RequestError` for what can never be served.
    """
    params = asked.sampling_params()
    prompt = await service.prompts.read_messages(
        asked.messages,
        tools=asked.offered_tools,
        add_generation_prompt=asked.starts_turn,
        continues_last=asked.continue_final_message,
        variables=asked.chat_template_kwargs,
    )
    ids = [prompt.token_ids]
    generation = make_generation(service, request, asked, ids, params, card, arrival_time)
    parsers = [_parser(service, asked, prompt) for _ in range(generation.num_choices)]
    return generation, parsers


def _parser(service: Service, asked: ChatRequest, prompt: ChatPrompt) -> MessageParser:
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


def head_of(card: ModelCard, generation: Generation) -> ReplyHead:
    """What every part of the reply has in common."""
    return ReplyHead(
        request_id=generation.requests[0].request_id,
        model=card.names[0],
        system_fingerprint=card.system_fingerprint,
    )


def wants(asked: GenerationRequest, option: str) -> bool:
    """Whether an option of `stream_options` is on."""
    return asked.stream_options is not None and getattr(asked.stream_options, option) is True


def answer(
    generation: Generation, reply: ReplyFormat, asked: GenerationRequest, ignored: list[str]
) -> Response:
    """The reply, whole or in a stream."""
    headers = ignored_header(ignored)
    if asked.stream:
        include_usage = wants(asked, "include_usage")
        return EventStream(generation, reply, headers, include_usage=include_usage)
    return WholeReply(generation, reply, headers)
