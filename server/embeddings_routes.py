"""`/v1/embeddings`: a vector for each text, from the model's final hidden states."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from llmserve.engine.request import Pooling, RequestOutput

from .embeddings import as_base64, normalized
from .field_values import Prompts
from .model_card import ModelCard
from .reading import Reading, ReadingReply
from .routing import body_of, ignored_header, read_asked
from .schemas import ModelRequest
from .server_state import ServerState

__all__ = ["EmbeddingRequest", "embeddings_router", "usage_of"]


class EmbeddingRequest(ModelRequest):
    """`POST /v1/embeddings`."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "dimensions": (),
        "truncate_prompt_tokens": (),
    }

    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Literal["mean", "last"] = "mean"
    normalize: bool = True
    add_special_tokens: bool = True


def embeddings_router(state: ServerState) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/embeddings", openapi_extra=body_of(EmbeddingRequest))
    async def embeddings(request: Request) -> Response:
        """Vectors of texts."""
        return await _embed(state, request)

    return router


async def _embed(state: ServerState, request: Request) -> Response:
    arrival_time = time.monotonic()
    state.check_open()
    service, asked, card, ignored = await read_asked(state, request, EmbeddingRequest)
    prompts = await service.prompts.read(
        asked.input,
        add_special_tokens=asked.add_special_tokens,
        param="input",
        most=service.limits.max_inputs,
    )
    reading = Reading(
        service,
        prompts,
        card=card,
        tenant=request.state.tenant,
        arrival_time=arrival_time,
        pooling=Pooling(asked.pooling),
    )

    def render(outputs: Sequence[RequestOutput]) -> bytes:
        return _render(asked, card, reading.num_prompt_tokens, outputs)

    return ReadingReply(reading, render, ignored_header(ignored))


def _render(
    asked: EmbeddingRequest, card: ModelCard, num_tokens: int, outputs: Sequence[RequestOutput]
) -> bytes:
    data = []
    for index, output in enumerate(outputs):
        vector = output.vector or []
        values = normalized(vector) if asked.normalize else vector
        embedding = as_base64(values) if asked.encoding_format == "base64" else values
        data.append({"object": "embedding", "index": index, "embedding": embedding})
    return orjson.dumps(
        {
            "object": "list",
            "data": data,
            "model": card.names[0],
            "system_fingerprint": card.system_fingerprint,
            "usage": usage_of(num_tokens),
        }
    )


def usage_of(num_tokens: int) -> dict[str, int]:
    """The usage of a request that generates nothing."""
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
