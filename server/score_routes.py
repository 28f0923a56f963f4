"""`/v1/score` and `/v1/rerank`: how well texts go together.

A classifier with one label reads both texts at once and its score counts, squeezed to 0..1 (a
cross-encoder). Any other model embeds each, and the cosine of the angle between them counts.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from typing import Annotated

import orjson
from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from llmserve.engine.request import Pooling, RequestOutput, Scoring
from llmserve.errors import RequestError

from .embeddings import cosine
from .embeddings_routes import usage_of
from .field_values import Texts
from .model_card import ModelCard
from .reading import Reading, ReadingReply
from .routing import body_of, ignored_header, read_asked
from .schemas import ModelRequest
from .server_state import ServerState
from .service import Service

__all__ = ["RerankRequest", "ScoreRequest", "score_router"]

PAIR_SEPARATOR = "\n"
"""Between the two texts that a cross-encoder reads."""

Pair = tuple[str, str]


class ScoreRequest(ModelRequest):
    """`POST /v1/score`: one text against one or several, or text by text."""

    text_1: Texts
    text_2: Texts

    def pairs(self) -> list[Pair]:
        """The texts to compare. Raises `RequestError` where their numbers do not go together."""
        first = self.text_1 * len(self.text_2) if len(self.text_1) == 1 else self.text_1
        if len(first) != len(self.text_2):
            raise RequestError(
                f"text_1 has {len(self.text_1)} texts and text_2 {len(self.text_2)}: give one, or "
                "as many",
                param="text_1",
            )
        return list(zip(first, self.text_2, strict=True))


class RerankRequest(ModelRequest):
    """`POST /v1/rerank`."""

    query: str
    documents: Texts
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = True


def score_router(state: ServerState) -> APIRouter:
    """Both routes."""
    router = APIRouter()

    @router.post("/v1/score", openapi_extra=body_of(ScoreRequest))
    async def score(request: Request) -> Response:
        """How well pairs of texts go together."""
        return await _score(state, request)

    @router.post("/v1/rerank", openapi_extra=body_of(RerankRequest))
    async def rerank(request: Request) -> Response:
        """Documents by how well they answer a query."""
        return await _rerank(state, request)

    return router


async def _score(state: ServerState, request: Request) -> Response:
    arrival_time = time.monotonic()
    state.check_open()
    service, asked, card, ignored = await read_asked(state, request, ScoreRequest)
    comparison = _Comparison(service, card, asked.pairs(), param="text_2")
    reading = await comparison.reading(request.state.tenant, arrival_time)

    def render(outputs: Sequence[RequestOutput]) -> bytes:
        data = [
            {"index": index, "object": "score", "score": score}
            for index, score in enumerate(comparison.scores(outputs))
        ]
        usage = usage_of(reading.num_prompt_tokens)
        head = {"id": _new_id("score"), "object": "list", "model": card.names[0]}
        return orjson.dumps({**head, "data": data, "usage": usage})

    return ReadingReply(reading, render, ignored_header(ignored))


async def _rerank(state: ServerState, request: Request) -> Response:
    arrival_time = time.monotonic()
    state.check_open()
    service, asked, card, ignored = await read_asked(state, request, RerankRequest)
    pairs = [(asked.query, document) for document in asked.documents]
    comparison = _Comparison(service, card, pairs, param="documents")
    reading = await comparison.reading(request.state.tenant, arrival_time)

    def render(outputs: Sequence[RequestOutput]) -> bytes:
        results = _ranked(asked, comparison.scores(outputs))
        usage = usage_of(reading.num_prompt_tokens)
        head = {"id": _new_id("rerank"), "model": card.names[0]}
        return orjson.dumps({**head, "results": results, "usage": usage})

    return ReadingReply(reading, render, ignored_header(ignored))


def _ranked(asked: RerankRequest, scores: Sequence[float]) -> list[dict[str, object]]:
    """Best first, ties in the documents' order."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    results: list[dict[str, object]] = []
    for index in order[: asked.top_n]:
        result: dict[str, object] = {"index": index, "relevance_score": scores[index]}
        if asked.return_documents:
            result["document"] = {"text": asked.documents[index]}
        results.append(result)
    return results


class _Comparison:
    """Pairs of texts, as one model reads them: together, or each of the different ones alone."""

    def __init__(self, service: Service, card: ModelCard, pairs: Sequence[Pair], *, param: str):
        self._service = service
        self._card = card
        self._pairs = pairs
        self._param = param
        self._is_cross = len(service.card.info.labels) == 1
        if self._is_cross:
            self._texts = [PAIR_SEPARATOR.join(pair) for pair in pairs]
        else:
            self._texts = list(dict.fromkeys(text for pair in pairs for text in pair))

    async def reading(self, tenant: str, arrival_time: float) -> Reading:
        """What the engine has to do."""
        prompts = await self._service.prompts.read(
            self._texts,
            add_special_tokens=True,
            param=self._param,
            most=self._service.limits.max_inputs,
        )
        return Reading(
            self._service,
            prompts,
            card=self._card,
            tenant=tenant,
            arrival_time=arrival_time,
            pooling=None if self._is_cross else Pooling.MEAN,
            scoring=Scoring.LAST if self._is_cross else None,
        )

    def scores(self, outputs: Sequence[RequestOutput]) -> list[float]:
        """One for each pair."""
        if self._is_cross:
            return [_squeezed(output.scores[0][0]) for output in outputs]
        vectors = {
            text: output.vector or [] for text, output in zip(self._texts, outputs, strict=True)
        }
        return [cosine(vectors[first], vectors[second]) for first, second in self._pairs]


def _squeezed(score: float) -> float:
    """Its logistic function."""
    if score >= 0:
        return 1 / (1 + math.exp(-score))
    return math.exp(score) / (1 + math.exp(score))


def _new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"
