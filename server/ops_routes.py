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
from .server_state import ServerState
from .service import Service
from .traces import MAX_REQUESTS, chrome_trace

__all__ = ["ops_router"]


def ops_router(state: ServerState) -> APIRouter:
    """Probes, metrics, limits, tokenize and detokenize."""
    router = APIRouter()

    @router.get("/health")
    async def health(request: Request) -> Response:
        """Whether engines make progress; 503 when none does: gone, or stuck with work to do."""
        return _health(state, request)

    @router.get("/ready")
    async def ready(request: Request) -> Response:
        """Whether new requests are taken; 503 from the moment the server is told to end."""
        if state.is_draining:
            return plain_error(state.limits, 503, "the server is shutting down")
        return _health(state, request)

    @router.get("/metrics")
    async def metrics() -> Response:
        """Counters and histograms in Prometheus' format."""
        return Response(state.metrics.render(), headers={"content-type": CONTENT_TYPE})

    @router.get("/kv-blocks")
    async def kv_blocks() -> Response:
        """Who holds which KV blocks at this moment."""
        alive = [service for service in state.services if not service.engine.died.is_set()]
        return json_reply({"models": [await _kv_blocks(service) for service in alive]})

    @router.get("/requests/{request_id}/trace")
    async def trace(request: Request, request_id: str) -> Response:
        """Where the time of one of the caller's latest requests went."""
        return _trace(state, request, request_id)

    @router.get("/limits")
    async def limits() -> Response:
        """Bounds in force."""
        return json_reply(asdict(state.limits))

    @router.post("/tokenize", openapi_extra=body_of(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        """Token ids of a text or a conversation."""
        return await _tokenize(state, request)

    @router.post("/detokenize", openapi_extra=body_of(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        return await _detokenize(state, request)

    return router


def _health(state: ServerState, request: Request) -> Response:
    """How one model is, named by the query's `model`, or all of them together are."""
    problems = state.problems()
    asked = request.query_params.get("model")
    names = [service.name for service in state.services]
    if asked is not None:
        names = [state.find(asked)[0].name]
    if all(name in problems for name in names):
        told = dict.fromkeys(problems[name] for name in names)
        return plain_error(state.limits, 503, "; ".join(told))
    # No names: these routes need no key.
    return json_reply({"status": "degraded" if problems.keys() & set(names) else "ok"})


async def _kv_blocks(service: Service) -> dict[str, object]:
    engine = service.engine
    return {
        "model": service.name,
        "block_size": engine.config.block_size,
        "replicas": await engine.block_maps(),
    }


def _trace(state: ServerState, request: Request, request_id: str) -> Response:
    traces = state.traces.find(request_id, request.state.tenant)
    if not traces:
        raise NotFoundError(
            f"no request {request_id[:64]!r} of this key's is remembered: the id is that of a "
            f"reply, and the latest {MAX_REQUESTS} are kept",
            param="request_id",
        )
    match request.query_params.get("format", "json"):
        case "json":
            return json_reply({"prompts": [trace.as_dict() for trace in traces]})
        case "chrome":
            return json_reply(chrome_trace(traces))
    raise RequestError("format takes json and chrome", param="format")


async def _tokenize(state: ServerState, request: Request) -> Response:
    body = await read_object(request, state.limits)
    asked, _ = parse_request(TokenizeRequest, body)
    service = state.find(asked.model)[0].pinned()
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


async def _detokenize(state: ServerState, request: Request) -> Response:
    body = await read_object(request, state.limits)
    asked, _ = parse_request(DetokenizeRequest, body)
    service = state.find(asked.model)[0].pinned()
    check_token_ids(asked.tokens, service.card.info.vocab_size, param="tokens")
    text = service.tokenizer.decode(list(asked.tokens), skip_special_tokens=False)
    return json_reply({"prompt": text})
