"""Prompts that the model reads and writes nothing after: for vectors, scores, classes, answers."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Callable, Mapping, Sequence

from starlette.types import Send

from llmserve.engine.admission import check_request
from llmserve.engine.request import FinishReason, Pooling, Request, RequestOutput, Scoring
from llmserve.sampling import MAX_SEED, SamplingParams

from .engine_requests import cache_salt
from .error_replies import DeadlineError
from .generation import check_outcome
from .mailbox import Mailbox
from .model_card import ModelCard
from .service import Service
from .streaming import EngineReply

__all__ = ["Reading", "ReadingReply"]


class Reading:
    """The prompts of one HTTP request, from submission to the last one's end.

    At most as many are with the engine at once as a completion may have prompts: a request of a
    thousand texts does not fill the queue. Close it in every case.
    """

    def __init__(
        self,
        service: Service,
        prompts: Sequence[list[int]],
        *,
        card: ModelCard,
        tenant: str,
        arrival_time: float,
        pooling: Pooling | None = None,
        scoring: Scoring | None = None,
    ) -> None:
        """Check the prompts against the model; nothing is queued yet.

        Raises `RequestError` for what can never be served.
        """
        self.limits = service.limits
        self._engine = service.engine
        self._metrics = service.metrics
        self._arrival_time = arrival_time
        self._salt = cache_salt("" if service.settings.shares_prefix_cache else tenant, "")
        self._requests = [
            self._request(prompt, card, tenant, pooling, scoring) for prompt in prompts
        ]
        for request in self._requests:
            check_request(request, self._engine.info, self._engine.config)
        self.num_prompt_tokens = sum(map(len, prompts))
        self.num_tokens = 0
        """Tokens of prompts that were handed to the engine."""
        service.traces.begin(self._requests, block_size=service.engine.config.block_size)
        self._mailbox = Mailbox()
        self._num_submitted = 0
        self._ended: dict[str, RequestOutput] = {}
        self._is_open = False

    @property
    def request_id(self) -> str:
        """Of the first prompt's request."""
        return self._requests[0].request_id

    def start(self) -> None:
        """Hand the first prompts to the engine.

        Raises:
            OverloadedError: there is no room now.
            EngineDeadError: there is no engine.
        """
        self._engine.requests.hold()
        self._is_open = True
        self._submit_next()
        self._metrics.num_prompt_tokens += self.num_prompt_tokens

    async def outputs(self) -> list[RequestOutput]:
        """What came of each prompt, in their order.

        Raises what a prompt ended by, if not by being read; `DeadlineError` where time was up.
        """
        while len(self._ended) < len(self._requests):
            for output in await self._mailbox.take():
                self._take(output)
            self._submit_next()
        return [self._ended[request.request_id] for request in self._requests]

    def close(self) -> None:
        """Abort what has not ended. Idempotent."""
        if not self._is_open:
            return
        self._is_open = False
        self._engine.requests.release()
        for request in self._requests[: self._num_submitted]:
            self._engine.requests.abort(request.request_id)
            if request.request_id not in self._ended:
                self._metrics.count_end(FinishReason.ABORT)
        self._metrics.request.observe(time.monotonic() - self._arrival_time)

    def _request(
        self,
        prompt: list[int],
        card: ModelCard,
        tenant: str,
        pooling: Pooling | None,
        scoring: Scoring | None,
    ) -> Request:
        return Request(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(),
            seed=secrets.randbelow(MAX_SEED + 1),
            arrival_time=self._arrival_time,
            tenant=tenant,
            cache_salt=self._salt,
            adapter=card.adapter,
            pooling=pooling,
            scoring=scoring,
            deadline=self._arrival_time + self.limits.max_deadline_s,
        )

    def _submit_next(self) -> None:
        room = self.limits.max_prompts - (self._num_submitted - len(self._ended))
        requests = self._requests[self._num_submitted : self._num_submitted + room]
        if requests:
            self._engine.requests.submit(requests, self._mailbox, is_held=True)
            self._num_submitted += len(requests)
            self.num_tokens += sum(len(request.prompt_token_ids) for request in requests)

    def _take(self, output: RequestOutput) -> None:
        reason = output.finish_reason
        assert reason is not None, "a prompt that is only read has one output"
        self._ended[output.request_id] = output
        self._metrics.count_end(reason)
        check_outcome(output, is_dead=self._engine.died.is_set())
        if reason is FinishReason.TIMEOUT:
            raise DeadlineError("the request was not done by its deadline")


class ReadingReply(EngineReply):
    """One JSON document about prompts that were read."""

    def __init__(
        self,
        reading: Reading,
        render: Callable[[list[RequestOutput]], bytes],
        headers: Mapping[str, str],
    ) -> None:
        """`render` makes the document of the outputs."""
        super().__init__(reading, headers)
        self._reading = reading
        self._render = render

    async def _run(self, send: Send) -> None:
        outputs = await self._reading.outputs()
        await self._send_json(self._render(outputs), send)
