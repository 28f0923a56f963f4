"""`/v1/classify` and `/v1/answers`: what a model's head says of texts."""

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

from llmserve.engine.request import RequestOutput, Scoring
from llmserve.errors import RequestError

from .answers import best_spans, spelled
from .embeddings_routes import usage_of
from .field_values import Prompts
from .reading import Reading, ReadingReply
from .routing import body_of, ignored_header, read_asked
from .schemas import ModelRequest
from .server_state import ServerState
from .service import Service

__all__ = ["AnswerRequest", "ClassifyRequest", "classify_router", "softmax"]

QUESTION_END = "\n"
"""Between a question and the text that may answer it."""


class ClassifyRequest(ModelRequest):
    """`POST /v1/classify`."""

    input: Prompts
    add_special_tokens: bool = True


class AnswerRequest(ModelRequest):
    """`POST /v1/answers`: the span of `context` that answers `question`."""

    question: Annotated[str, Field(min_length=1)]
    context: Annotated[str, Field(min_length=1)]
    top_n: Annotated[int, Field(ge=1, le=20)] = 1
    max_answer_tokens: Annotated[int, Field(ge=1, le=1024)] = 30


def classify_router(state: ServerState) -> APIRouter:
    """Both routes."""
    router = APIRouter()

    @router.post("/v1/classify", openapi_extra=body_of(ClassifyRequest))
    async def classify(request: Request) -> Response:
        """Labels of texts, or of their tokens."""
        return await _classify(state, request)

    @router.post("/v1/answers", openapi_extra=body_of(AnswerRequest))
    async def answers(request: Request) -> Response:
        """Where a text answers a question."""
        return await _answers(state, request)

    return router


async def _classify(state: ServerState, request: Request) -> Response:
    arrival_time = time.monotonic()
    state.check_open()
    service, asked, card, ignored = await read_asked(state, request, ClassifyRequest)
    _check_head(service, "sequence", "token")
    prompts = await service.prompts.read(
        asked.input,
        add_special_tokens=asked.add_special_tokens,
        param="input",
        most=service.limits.max_inputs,
    )
    is_whole = card.info.head == "sequence"
    reading = Reading(
        service,
        prompts,
        card=card,
        tenant=request.state.tenant,
        arrival_time=arrival_time,
        scoring=Scoring.LAST if is_whole else Scoring.EACH,
    )

    def render(outputs: Sequence[RequestOutput]) -> bytes:
        data: list[dict[str, object]] = []
        for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            verdicts = [_verdict(card.info.labels, scores) for scores in output.scores]
            if is_whole:
                data.append({"index": index, **verdicts[0]})
            else:
                tokens = [service.tokenizer.token_text(token_id) for token_id in prompt]
                told = zip(tokens, verdicts, strict=True)
                data.append(
                    {"index": index, "tokens": [{"token": text, **said} for text, said in told]}
                )
        return orjson.dumps(
            {
                "id": f"classify-{uuid.uuid4().hex}",
                "object": "list",
                "model": card.names[0],
                "data": data,
                "usage": usage_of(reading.num_prompt_tokens),
            }
        )

    return ReadingReply(reading, render, ignored_header(ignored))


async def _answers(state: ServerState, request: Request) -> Response:
    arrival_time = time.monotonic()
    state.check_open()
    service, asked, card, ignored = await read_asked(state, request, AnswerRequest)
    _check_head(service, "span")
    read = service.prompts.read
    (question,) = await read([asked.question + QUESTION_END], add_special_tokens=True)
    (context,) = await read([asked.context], add_special_tokens=False, param="context")
    reading = Reading(
        service,
        [question + context],
        card=card,
        tenant=request.state.tenant,
        arrival_time=arrival_time,
        scoring=Scoring.EACH,
    )

    def render(outputs: Sequence[RequestOutput]) -> bytes:
        scores = outputs[0].scores[len(question) :]
        text, ends = spelled(service.tokenizer, context)
        spans = best_spans(scores, count=asked.top_n, max_tokens=asked.max_answer_tokens)
        found = []
        for span in spans:
            start, end = ends[span.first], ends[span.last + 1]
            found.append(
                {"text": text[start:end], "start": start, "end": end, "score": span.probability}
            )
        return orjson.dumps(
            {
                "id": f"answers-{uuid.uuid4().hex}",
                "object": "list",
                "model": card.names[0],
                "answers": found,
                "usage": usage_of(reading.num_prompt_tokens),
            }
        )

    return ReadingReply(reading, render, ignored_header(ignored))


def _check_head(service: Service, *kinds: str) -> None:
    """Raise `RequestError` unless the model has a head of one of `kinds`."""
    head = service.card.info.head
    if head not in kinds:
        has = "none" if head is None else f"one of the kind {head}"
        raise RequestError(
            f"this route needs a model with a head of the kind {' or '.join(kinds)}; this one has "
            f"{has}",
            param="model",
        )


def _verdict(labels: Sequence[str], scores: Sequence[float]) -> dict[str, object]:
    """The likeliest label and all probabilities; of one label alone, its logistic function."""
    probabilities = softmax([*scores, 0.0])[:1] if len(scores) == 1 else softmax(scores)
    best = max(range(len(labels)), key=lambda index: scores[index])
    return {"label": labels[best], "probs": probabilities, "num_classes": len(labels)}


def softmax(scores: Sequence[float]) -> list[float]:
    """Probabilities of finite scores."""
    largest = max(scores)
    weights = [math.exp(score - largest) for score in scores]
    total = math.fsum(weights)
    return [weight / total for weight in weights]
