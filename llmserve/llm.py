"""Offline use: a model folder in, texts out, through the same engine that serves."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from .checkpoint import Checkpoint
from .engine.config import plan_cache
from .engine.engine import Engine
from .engine.request import FinishReason, Request
from .errors import EngineError, RequestError
from .limits import Limits
from .output import OutputProcessor, TextDelta
from .runners.protocol import TokenLogprobs
from .runners.registry import load_runner
from .sampling import MAX_SEED, SamplingParams
from .text.chat_template import ChatTemplate
from .text.tokenizer import Tokenizer

__all__ = ["LLM", "Choice", "Completion"]

Prompt = str | Sequence[int]
Message = dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One answer to a prompt."""

    text: str
    token_ids: list[int]
    """Generated ids, an end id included."""
    finish_reason: FinishReason
    stop_reason: str | int | None
    """The stop string or stop id that ended it, when one did."""
    logprobs: list[TokenLogprobs]
    """One entry per id where `logprobs` was asked for, else empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """All answers to one prompt."""

    prompt_token_ids: list[int]
    choices: list[Choice]

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text


class LLM:
    """A loaded model for use without a server. Close it, or use it as a context manager.

    Not for several threads at once: one engine steps in the caller's thread.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        runner: str = "auto",
        dtype: str | None = None,
        device: str = "cpu",
        threads: int | None = None,
        max_seq_len: int | None = None,
        max_num_seqs: int = 64,
        max_batched_tokens: int = 512,
        cache_bytes: int = 256 << 20,
        verify: bool = True,
        limits: Limits | None = None,
    ) -> None:
        """Open and load a model folder.

        Args:
            model: The model folder.
            runner: One of `llmserve.runners.registry.RUNNERS`.
            dtype: Type of the arithmetic; None: as the folder says.
            device: `cpu`, `cuda` or `cuda:N`.
            threads: Threads for one step; None: one for a small model, else one for each core.
            max_seq_len: Tokens of context; None: the model's.
            max_num_seqs: Most sequences running at once.
            max_batched_tokens: Most tokens in one step.
            cache_bytes: Memory for the KV cache.
            verify: Check the folder's files against its manifest.
            limits: Bounds on requests and chat templates.

        Raises:
            CheckpointError: the folder cannot be used; the message names file and cause.
            ConfigError: a setting cannot be used.
        """
        self.checkpoint = Checkpoint.open(model, verify=verify)
        self.tokenizer = Tokenizer.load(self.checkpoint.path)
        self.limits = limits or Limits()
        self._runner = load_runner(
            runner, self.checkpoint, dtype=dtype, device=device, threads=threads
        )
        self.info = self._runner.info
        self.config = plan_cache(
            self.info,
            cache_bytes=cache_bytes,
            max_seq_len=max_seq_len,
            max_batched_tokens=max_batched_tokens,
            max_num_seqs=max_num_seqs,
        )
        self.engine = Engine(self._runner, self.config)
        self._num_requests = 0

    def close(self) -> None:
        """Free the model and its cache."""
        self._runner.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Answer all prompts, batched together, in their order.

        Args:
            prompts: Texts, or lists of token ids that are taken as they are.
            params: For all prompts, or one for each; None: the defaults.
            on_progress: Called after every step with (finished prompts, tokens generated).

        Raises:
            RequestError: a prompt or a parameter cannot be served; nothing was generated.
            EngineError: the runner failed.
        """
        each = self._params_for(prompts, params)
        jobs: list[_Job] = []
        try:
            for prompt, one in zip(prompts, each, strict=True):
                jobs.append(self._submit(prompt, one))
            self._run(jobs, on_progress)
        finally:
            self._abort(jobs)
        return [job.completion() for job in jobs]

    def chat(
        self,
        conversations: Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Answer conversations through the model's chat template; each as in `generate`."""
        prompts = [self.render_chat(messages) for messages in conversations]
        return self.generate(prompts, params, on_progress=on_progress)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[TextDelta]:
        """Answer one prompt piece by piece; leaving the loop early aborts it.

        Raises `RequestError` for more than one choice: pieces of several would be mixed.
        """
        params = params or SamplingParams()
        if params.n != 1:
            raise RequestError(f"a stream has one choice, not n={params.n}", param="n")
        job = self._submit(prompt, params)
        try:
            while not job.is_done:
                yield from self._step([job])
        finally:
            self._abort([job])

    def render_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, up to where the model is to answer.

        Raises `TemplateError` if the model has no chat template or it fails on the messages.
        """
        template = ChatTemplate.for_tokenizer(self.tokenizer, self.limits)
        text = template.render(list(messages), add_generation_prompt=True)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _params_for(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> Sequence[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise RequestError(f"{len(params)} sampling parameters for {len(prompts)} prompts")
        return params

    def _submit(self, prompt: Prompt, params: SamplingParams) -> _Job:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        seed = params.seed if params.seed is not None else secrets.randbelow(MAX_SEED + 1)
        self._num_requests += 1
        request = Request(
            request_id=f"llm-{self._num_requests}",
            prompt_token_ids=ids,
            sampling_params=params,
            seed=seed,
            arrival_time=time.monotonic(),
        )
        self.engine.add_request(request)
        return _Job(self.tokenizer, request)

    def _run(self, jobs: list[_Job], on_progress: Callable[[int, int], None] | None) -> None:
        while not all(job.is_done for job in jobs):
            self._step(jobs)
            if on_progress is not None:
                done = sum(job.is_done for job in jobs)
                on_progress(done, sum(job.num_tokens for job in jobs))

    def _step(self, jobs: list[_Job]) -> list[TextDelta]:
        by_id = {job.request.request_id: job for job in jobs}
        deltas = []
        for output in self.engine.step(time.monotonic()):
            job = by_id.get(output.request_id)
            if job is None:
                continue  # the last outputs of a stream that was left early
            if output.error is not None:
                raise EngineError(output.error)
            processor = job.processors[output.choice_index]
            delta = processor.push(output)
            if processor.stopped and output.finish_reason is None:
                self.engine.finish(output.request_id, output.choice_index)
            job.take(output.choice_index, delta)
            deltas.append(delta)
        return deltas

    def _abort(self, jobs: list[_Job]) -> None:
        for job in jobs:
            if not job.is_done:
                self.engine.abort(job.request.request_id)


class _Job:
    """A request on its way, with the text of each choice so far."""

    def __init__(self, tokenizer: Tokenizer, request: Request) -> None:
        params = request.sampling_params
        self.request = request
        self.processors = [
            OutputProcessor(tokenizer, params, request.prompt_token_ids) for _ in range(params.n)
        ]
        self._deltas: list[list[TextDelta]] = [[] for _ in range(params.n)]

    @property
    def is_done(self) -> bool:
        return all(deltas and deltas[-1].finish_reason for deltas in self._deltas)

    @property
    def num_tokens(self) -> int:
        return sum(processor.num_tokens for processor in self.processors)

    def take(self, choice_index: int, delta: TextDelta) -> None:
        self._deltas[choice_index].append(delta)

    def completion(self) -> Completion:
        return Completion(
            prompt_token_ids=self.request.prompt_token_ids,
            choices=[_choice(deltas) for deltas in self._deltas],
        )


def _choice(deltas: list[TextDelta]) -> Choice:
    last = deltas[-1]
    if last.finish_reason is None:
        raise EngineError("a choice was read before its end")
    return Choice(
        text="".join(delta.text for delta in deltas),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        logprobs=[entry for delta in deltas for entry in delta.logprobs],
    )
