"""One HTTP request's way through the engine: prompts in, pieces of text of every choice out.

A choice's index counts over all prompts: choice c of prompt p is `p * n + c`, as in OpenAI's API.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmserve.engine.admission import check_request
from llmserve.engine.request import FinishReason, Request, RequestOutput
from llmserve.errors import EngineDeadError, EngineError, RequestError
from llmserve.limits import Limits
from llmserve.output import OutputProcessor, TextDelta
from llmserve.runners.protocol import TokenLogprobs
from llmserve.text.tokenizer import Tokenizer

from .engine_handle import EngineHandle
from .error_replies import DrainingError
from .mailbox import Mailbox
from .model_metrics import ModelMetrics

__all__ = ["Generation", "Update", "Usage", "check_outcome"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request, over all its prompts and choices."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    timing: dict[str, float | None] | None = None
    """Seconds in the queue, in the prompt and in the answer, where they were asked for."""

    def as_dict(self) -> dict[str, object]:
        """In the API's shape."""
        timing = {} if self.timing is None else {"timing": self.timing}
        return {
            **timing,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(slots=True)
class Update:
    """What one step did for one choice."""

    index: int
    """The choice's index over all prompts."""
    delta: TextDelta
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Where asked for, with a choice's first update: one entry per prompt token but the first."""


class Generation:
    """The choices of one HTTP request, from submission to the last one's end.

    Close it in every case: what has not ended by then is aborted.
    """

    def __init__(
        self,
        engine: EngineHandle,
        tokenizer: Tokenizer,
        metrics: ModelMetrics,
        *,
        requests: Sequence[Request],
        limits: Limits,
        read_timing: Callable[[], dict[str, float | None] | None] = lambda: None,
        tells_timing: bool = False,
    ) -> None:
        """Check the requests against the model and the limits; nothing is queued yet.

        `requests` has one for each prompt, at least one, all with the same parameters.
        `read_timing` gives the seconds of each phase, where they are known; usage tells them with
        `tells_timing`.

        Raises `RequestError` for what can never be served.
        """
        self._engine = engine
        self._metrics = metrics
        self._params = params = requests[0].sampling_params
        self._arrival_time = requests[0].arrival_time
        self.requests = requests
        self.limits = limits
        self._read_timing = read_timing
        self._tells_timing = tells_timing
        params.check_limits(limits)
        if len(requests) * params.n > limits.max_sequences_per_request:
            raise RequestError(
                f"{len(requests)} prompts with n={params.n} are above this server's "
                f"{limits.max_sequences_per_request} choices for one request",
                param="n",
            )
        for request in requests:
            check_request(request, engine.info, engine.config)
        self.num_choices = len(requests) * params.n
        self._open = set(range(self.num_choices))
        self._prompts = {
            request.request_id: _Prompt(index, len(request.prompt_token_ids))
            for index, request in enumerate(requests)
        }
        self._processors = [
            OutputProcessor(tokenizer, params, request.prompt_token_ids)
            for request in requests
            for _ in range(params.n)
        ]
        self._last_token_times = [0.0] * self.num_choices
        self._mailbox = Mailbox()
        self._is_submitted = self._was_submitted = False

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
            cached_tokens=sum(prompt.num_cached_tokens for prompt in self._prompts.values()),
            timing=self._read_timing() if self._tells_timing else None,
        )

    @property
    def request_id(self) -> str:
        """Of the first prompt's request, which the reply carries."""
        return self.requests[0].request_id

    @property
    def num_tokens(self) -> int:
        """Tokens used so far; 0 before it was handed to the engine."""
        usage = self.usage
        return usage.prompt_tokens + usage.completion_tokens if self._was_submitted else 0

    def start(self) -> None:
        """Hand it to the engine.

        Raises:
            OverloadedError: there is no room now.
            EngineDeadError: there is no engine.
        """
        self._engine.requests.submit(self.requests, self._mailbox)
        self._is_submitted = self._was_submitted = True
        self._metrics.num_prompt_tokens += self.usage.prompt_tokens

    async def updates(self) -> list[Update]:
        """What has happened since the last call; may be nothing to show. Call it until `is_done`.

        Raises:
            EngineError: the engine failed on a choice; the others are aborted by `close`.
            RequestError: the engine refused the request.
            DrainingError: the server ended the request because it is about to end itself.
        """
        outputs = await self._mailbox.take()
        now = time.monotonic()
        updates: list[Update] = []
        for output in outputs:
            self._advance(output, now, updates)
        return updates

    def close(self) -> None:
        """Abort what has not ended, and count it. Idempotent."""
        if not self._is_submitted:
            return
        self._is_submitted = False
        for request in self.requests:
            self._engine.requests.abort(request.request_id)
        for index in sorted(self._open):
            self._end(index, FinishReason.ABORT)
        self._observe_end()

    def _advance(self, output: RequestOutput, now: float, updates: list[Update]) -> None:
        """Take an output, and add what it lets be shown."""
        prompt = self._prompts[output.request_id]
        index = prompt.index * self._params.n + output.choice_index
        if index not in self._open:
            return  # ended here a moment ago
        if output.finish_reason is not None:
            self._check(index, output)
        update = self._take(index, output, now)
        if output.choice_index == 0:
            prompt.learn(output)
        if self._params.prompt_logprobs is not None:
            updates += prompt.release(update)
        elif update is not None:
            updates.append(update)

    def _take(self, index: int, output: RequestOutput, now: float) -> Update | None:
        """What an output adds to its choice; None when there is nothing to show."""
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
        check_outcome(output, is_dead=self._engine.died.is_set())

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

    def _observe_end(self) -> None:
        metrics, usage = self._metrics, self.usage
        metrics.request.observe(time.monotonic() - self._arrival_time)
        metrics.prompt_tokens.observe(usage.prompt_tokens)
        metrics.answer_tokens.observe(usage.completion_tokens)
        if (phases := self._read_timing()) is not None:
            metrics.observe_phases(phases)

    def _end(self, index: int, reason: FinishReason) -> None:
        self._open.discard(index)
        self._metrics.count_end(reason)


def check_outcome(output: RequestOutput, *, is_dead: bool) -> None:
    """Raise what a request ended by, unless it is an end to tell of in a reply.

    Raises:
        RequestError: the engine refused it.
        EngineError: the engine failed on it; an `EngineDeadError` where the engine is gone.
        DrainingError: the server ended it because it is about to end itself.
    """
    if output.finish_reason is FinishReason.ERROR:
        if output.error_param is not None:
            raise RequestError(output.error or "refused", param=output.error_param or None)
        raise (EngineDeadError if is_dead else EngineError)(output.error or "engine error")
    if output.finish_reason is FinishReason.ABORT:
        raise DrainingError("the server is shutting down", retry_after_s=5.0)


class _Prompt:
    """What the choices of one prompt have in common; the engine tells it with the first one.

    Its siblings find the prompt's blocks in the cache, computed a moment ago: that is no hit to
    report. And they may have a token before the prompt's log-probabilities are there, which come
    first in every choice: such updates wait here.
    """

    def __init__(self, index: int, num_tokens: int) -> None:
        self.index = index
        self.num_cached_tokens = 0
        self._num_tokens = num_tokens
        self._is_told = False
        self._logprobs: list[TokenLogprobs] | None = None
        self._waiting: list[Update] = []
        self._begun: set[int] = set()

    def learn(self, output: RequestOutput) -> None:
        """Take what an output of the first choice says about the prompt."""
        self.num_cached_tokens = output.num_cached_tokens
        if not self._is_told:
            self._is_told = True
            # A choice that timed out before its first token has none to tell.
            if len(output.prompt_logprobs) == self._num_tokens - 1:
                self._logprobs = output.prompt_logprobs

    def release(self, update: Update | None) -> list[Update]:
        """The updates that may be shown now, each choice's first with the log-probabilities."""
        if update is not None:
            self._waiting.append(update)
        if not self._is_told:
            return []
        released, self._waiting = self._waiting, []
        for one in released:
            if one.index not in self._begun:
                self._begun.add(one.index)
                one.prompt_logprobs = self._logprobs
        return released
