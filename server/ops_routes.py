"""Routes for operating the server, and the tokenizer's two."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from llmserve.errors import RequestError
from llmserve.sampling import check_token_ids

from .error_replies import NotFoundError, plain_error
from .metrics import CONTENT_TYPE
from .request_body import read_object
from .routing import body_of, json_reply
from .schemas import DetokenizeRequest, TokenizeRequest, parse_request
from .service import Service
from .traces import MAX_REQUESTS, chrome_trace

__all__ = ["ops_router"]


def ops_router(service: Service) -> APIRouter:
    """Probes, metrics, limits, tokenize and detokenize."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        """Whether the engine makes progress; 503 when it is gone or stuck with work to do."""
        problem = service.problem()
        return (
            plain_error(service.limits, 503, problem) if problem else json_reply({"status": "ok"})
        )

    @router.get("/ready")
    async def ready() -> Response:
        """Whether new requests are taken; 503 from the moment the server is told to end."""
        problem = "the server is shutting down" if service.is_draining else service.problem()
        return (
            plain_error(service.limits, 503, problem) if problem else json_reply({"status": "ok"})
        )

    @router.get("/metrics")
    async def metrics() -> Response:
        """Counters and histograms in Prometheus' format."""
        return Response(service.metrics.render(), headers={"content-type": CONTENT_TYPE})

    @router.get("/requests/{request_id}/trace")
    async def trace(request: Request, request_id: str) -> Response:
        """Where the time of one of the caller's latest requests went."""
        return _trace(service, request, request_id)

    @router.get("/limits")
    async def limits() -> Response:
        """Bounds in force."""
        return json_reply(asdict(service.limits))

    @router.post("/tokenize", openapi_extra=body_of(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        """Token ids of a text or a conversation."""
        return await _tokenize(service, request)

    @router.post("/detokenize", openapi_extra=body_of(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        return await _detokenize(service, request)

    return router


def _trace(service: Service, request: Request, request_id: str) -> Response:
    traces = service.traces.find(request_id, request.state.tenant)
    if not traces:
        raise NotFoundError(
            f"no request {request_id[:64]!r} of this key's is remembered: the id is that of a "
            f"reply, and the latest {MAX_REQUESTS} are kept",
            param="request_id",
        )
    match request.query_params.get("format", "json"):
        case "json":
            block_size = service.engine.config.block_size
            return json_reply({"prompts": [trace.as_dict(block_size) for trace in traces]})
        case "chrome":
            return json_reply(chrome_trace(traces))
    raise RequestError("format takes json and chrome", param="format")


async def _tokenize(service: Service, request: Request) -> Response:
    service = service.pinned()
    body = await read_object(request, service.limits)
    asked, _ = parse_request(TokenizeRequest, body)
    service.card_named(asked.model)
    ids = await _ids_of(service, asked)
    reply: dict[str, object] = {
        "tokens": ids,
        "count": len(ids),
        "max_model_len": service.card.config.max_seq_len,
    }
    if asked.return_token_strs:
        reply["token_strs"] = [service.tokenizer.token_text(token_id) for token_id in ids]
    return json_reply(reply)


async def _ids_of(service: Service, asked: TokenizeRequest) -> list[int]:
    if asked.messages is not None and asked.prompt is None:
        prompt = await service.prompts.read_messages(
            asked.messages, add_generation_prompt=asked.add_generation_prompt
        )
        return prompt.token_ids
    if asked.prompt is not None and asked.messages is None:
        special = asked.add_special_tokens
        return (await service.prompts.read([asked.prompt], add_special_tokens=special))[0]
    raise RequestError("give either prompt or messages", param="prompt")


async def _detokenize(service: Service, request: Request) -> Response:
    service = service.pinned()
    body = await read_object(request, service.limits)
    asked, _ = parse_request(DetokenizeRequest, body)
    service.card_named(asked.model)
    check_token_ids(asked.tokens, service.card.info.vocab_size, param="tokens")
    text = service.tokenizer.decode(list(asked.tokens), skip_special_tokens=False)
    return json_reply({"prompt": text})
