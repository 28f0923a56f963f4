"""One HTTP request's way through the engine: prompts in, pieces of text of every choice out.

A choice's index counts over all prompts: choice c of prompt p is `p * n + c`, as in OpenAI's API.
"""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from llmserve.engine.admission import check_request
from llmserve.engine.request import FinishReason, Request, RequestOutput
from llmserve.errors import EngineDeadError, EngineError, RequestError
from llmserve.limits import Limits
from llmserve.output import OutputProcessor, TextDelta
from llmserve.sampling import MAX_SEED, SamplingParams
from llmserve.text.tokenizer import Tokenizer

from .engine_handle import EngineHandle
from .error_replies import DrainingError
from .live_requests import Mailbox
from .metrics import ServerMetrics

__all__ = ["Generation", "Update", "Usage"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request, over all its prompts and choices."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def as_dict(self) -> dict[str, object]:
        """In the API's shape."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, slots=True)
class Update:
    """What one step did for one choice."""

    index: int
    """The choice's index over all prompts."""
    delta: TextDelta


class Generation:
    """The choices of one HTTP request, from submission to the last one's end.

    Close it in every case: what has not ended by then is aborted.
    """

    def __init__(
        self,
        engine: EngineHandle,
        tokenizer: Tokenizer,
        metrics: ServerMetrics,
        *,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        limits: Limits,
        arrival_time: float,
    ) -> None:
        """Check the request against the model and the limits; nothing is queued yet.

        Raises `RequestError` for what can never be served.
        """
        self._engine = engine
        self._metrics = metrics
        self._arrival_time = arrival_time
        self.limits = limits
        params.check_limits(limits)
        if len(prompts) * params.n > limits.max_sequences_per_request:
            raise RequestError(
                f"{len(prompts)} prompts with n={params.n} are above this server's "
                f"{limits.max_sequences_per_request} choices for one request",
                param="n",
            )
        self.requests = _make_requests(prompts, params, arrival_time, limits)
        for request in self.requests:
            check_request(request, engine.info, engine.config)
        self.num_choices = len(prompts) * params.n
        self._open = set(range(self.num_choices))
        self._prompt_index = {
            request.request_id: index for index, request in enumerate(self.requests)
        }
        self._processors = [
            OutputProcessor(tokenizer, params, request.prompt_token_ids)
            for request in self.requests
            for _ in range(params.n)
        ]
        self._last_token_times = [0.0] * self.num_choices
        self._num_cached_tokens = [0] * len(self.requests)
        self._mailbox = Mailbox()
        self._is_submitted = False

    @property
    def is_done(self) -> bool:
        """Whether every choice has ended."""
        return not self._open

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(
            prompt_tokens=sum(len(request.prompt_token_ids) for request in self.requests),
            completion_tokens=sum(processor.num_tokens for processor in self._processors),
            cached_tokens=sum(self._num_cached_tokens),
        )

    def start(self) -> None:
        """Hand it to the engine.

        Raises:
            OverloadedError: there is no room now.
            EngineDeadError: there is no engine.
        """
        self._engine.requests.submit(self.requests, self._mailbox)
        self._is_submitted = True
        self._metrics.num_prompt_tokens += self.usage.prompt_tokens

    async def updates(self) -> list[Update]:
        """What has happened since the last call, at least one thing. Call it until `is_done`.

        Raises:
            EngineError: the engine failed on a choice; the others are aborted by `close`.
            DrainingError: the server ended the request because it is about to end itself.
        """
        outputs = await self._mailbox.take()
        now = time.monotonic()
        return [update for output in outputs if (update := self._advance(output, now))]

    def close(self) -> None:
        """Abort what has not ended, and count it. Idempotent."""
        if not self._is_submitted:
            return
        self._is_submitted = False
        for request in self.requests:
            self._engine.requests.abort(request.request_id)
        for index in sorted(self._open):
            self._end(index, FinishReason.ABORT)
        self._metrics.request.observe(time.monotonic() - self._arrival_time)

    def _advance(self, output: RequestOutput, now: float) -> Update | None:
        prompt_index = self._prompt_index[output.request_id]
        index = prompt_index * self.requests[0].sampling_params.n + output.choice_index
        if index not in self._open:
            return None  # ended here a moment ago
        self._check(index, output)
        self._num_cached_tokens[prompt_index] = max(
            self._num_cached_tokens[prompt_index], output.num_cached_tokens
        )
        if output.token_ids:
            self._observe(index, output, now)
        processor = self._processors[index]
        delta = processor.push(output)
        if processor.stopped and output.finish_reason is None:
            self._engine.requests.finish(output.request_id, output.choice_index)
        if delta.finish_reason is not None:
            self._end(index, delta.finish_reason)
        elif not delta.token_ids and not delta.text:
            return None  # all of it is held back
        return Update(index, delta)

    def _check(self, index: int, output: RequestOutput) -> None:
        if output.finish_reason is FinishReason.ERROR:
            self._end(index, FinishReason.ERROR)
            is_dead = self._engine.died.is_set()
            raise (EngineDeadError if is_dead else EngineError)(output.error or "engine error")
        if output.finish_reason is FinishReason.ABORT:
            raise DrainingError("the server is shutting down", retry_after_s=5.0)

    def _observe(self, index: int, output: RequestOutput, now: float) -> None:
        metrics = self._metrics
        metrics.num_generated_tokens += len(output.token_ids)
        if last := self._last_token_times[index]:
            metrics.token_gap.observe(now - last)
        else:
            metrics.first_token.observe(now - self._arrival_time)
            if output.scheduled_time is not None:
                metrics.queue.observe(output.scheduled_time - self._arrival_time)
        self._last_token_times[index] = now

    def _end(self, index: int, reason: FinishReason) -> None:
        self._open.discard(index)
        self._metrics.count_end(reason)


def _make_requests(
    prompts: Sequence[list[int]], params: SamplingParams, arrival_time: float, limits: Limits
) -> list[Request]:
    """One engine request for each prompt; each has its own random numbers."""
    return [
        Request(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=prompt,
            sampling_params=params,
            seed=params.seed if params.seed is not None else secrets.randbelow(MAX_SEED + 1),
            arrival_time=arrival_time,
            deadline=arrival_time + limits.max_deadline_s,
        )
        for prompt in prompts
    ]
