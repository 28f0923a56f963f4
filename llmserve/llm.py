"""Offline use: a model folder in, texts, scores and vectors out, by the same engine that serves."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from .checkpoint import Checkpoint
from .completion import Choice, Completion, Job, Score
from .engine.config import SpeculationConfig
from .engine.request import Pooling, Request
from .engine.step_log import StepLog, open_log
from .errors import ConfigError, EngineError, RequestError
from .limits import Limits
from .output import TextDelta
from .runners.native_options import NativeOptions
from .runners.protocol import Runner
from .runners.registry import load_runner
from .sampling import MAX_SEED, SamplingParams
from .startup import EngineOptions, start_engine
from .text.chat_template import ChatTemplate
from .text.tokenizer import Tokenizer

__all__ = ["LLM", "Choice", "Completion", "Score"]

Prompt = str | Sequence[int]
Message = dict[str, str]
Progress = Callable[[int, int], None]

_MOST_ROUNDS_S = 0.02
"""Of one step: whoever reads along sees fifty pieces a second."""


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
        deterministic: bool = False,
        tensor_parallel_size: int = 1,
        native: NativeOptions | None = None,
        enforce_eager: bool = False,
        max_seq_len: int | None = None,
        max_num_seqs: int = 64,
        max_batched_tokens: int | None = 512,
        cache_bytes: int = 256 << 20,
        prefix_cache: bool = True,
        adapters: Mapping[str, str | Path] | None = None,
        speculation: SpeculationConfig | None = None,
        draft_model: str | Path | None = None,
        record: str | Path | None = None,
        verify: bool = True,
        limits: Limits | None = None,
    ) -> None:
        """Open and load a model folder.

        Args:
            model: The model folder.
            runner: One of `llmserve.runners.registry.RUNNERS`.
            dtype: Type of the arithmetic; None: as the folder says.
            device: `cpu`, `cuda` or `cuda:N`.
            threads: Threads for one step; None: one for each core, for a small model on torch one.
            deterministic: Answers equal bit for bit whatever else is in the batch; the native
                runner's always are, on torch it is slower.
            tensor_parallel_size: Processes that compute `model` together, on the torch runner; on
                CUDA each has a device. A draft model is computed by the first alone.
            native: Options of the native runner, for `model`; the cache's type is torch's too.
            enforce_eager: On CUDA, start a step's kernels one by one in place of captured graphs.
            max_seq_len: Tokens of context; None: the model's.
            max_num_seqs: Most sequences running at once.
            max_batched_tokens: Most tokens in one step; None: found by trying, as the server does.
            cache_bytes: Memory for the KV cache.
            prefix_cache: Whether what equal beginnings have in common is computed once.
            adapters: LoRA adapters by name, each a folder in PEFT's format.
            speculation: How tokens are guessed ahead; None: not at all.
            draft_model: Folder of the model that guesses, for the method `draft`.
            record: File to write the engine's step log to; it holds prompts and answers.
            verify: Check the folder's files against its manifest.
            limits: Bounds on requests and chat templates.

        Raises:
            CheckpointError: the folder cannot be used; the message names file and cause.
            ConfigError: a setting cannot be used.
        """
        self.checkpoint = Checkpoint.open(model, verify=verify)
        self.tokenizer = Tokenizer.load(self.checkpoint.path)
        self.limits = limits or Limits()
        self._draft_runner: Runner | None = None
        if draft_model is not None:
            # Before the target: the number of threads is the process's, and the target's counts.
            draft = Checkpoint.open(draft_model, verify=verify)
            self._draft_runner = load_runner(
                runner,
                draft,
                dtype=dtype,
                device=device,
                threads=threads,
                enforce_eager=enforce_eager,
            )
        self._runner = load_runner(
            runner,
            self.checkpoint,
            dtype=dtype,
            device=device,
            threads=threads,
            deterministic=deterministic,
            tensor_parallel_size=tensor_parallel_size,
            native=native,
            enforce_eager=enforce_eager,
            adapters={name: Path(path) for name, path in (adapters or {}).items()},
        )
        self._log = None if record is None else open_log(Path(record))
        self.info = self._runner.info
        self.engine = start_engine(
            self._runner,
            EngineOptions(
                cache_bytes=cache_bytes,
                max_seq_len=max_seq_len,
                max_num_seqs=max_num_seqs,
                max_batched_tokens=max_batched_tokens,
                has_prefix_cache=prefix_cache,
                most_rounds_s=_MOST_ROUNDS_S,
                speculation=speculation,
            ),
            draft_runner=self._draft_runner,
            watcher=None if self._log is None else StepLog(self._log),
        )
        self.config = self.engine.config
        self._num_requests = 0

    def close(self) -> None:
        """Free the model and its cache."""
        self._runner.close()
        if self._draft_runner is not None:
            self._draft_runner.close()
        if self._log is not None:
            self._log.close()

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
        adapter: str | None = None,
        on_progress: Progress | None = None,
    ) -> list[Completion]:
        """Answer all prompts, batched together, in their order.

        Args:
            prompts: Texts, or lists of token ids that are taken as they are.
            params: For all prompts, or one for each; None: the defaults.
            adapter: Name of the LoRA adapter to answer with; None: the base model.
            on_progress: Called after every step with (finished prompts, tokens generated).

        Raises:
            RequestError: a prompt or a parameter cannot be served; nothing was generated.
            EngineError: the runner failed.
        """
        each = self._params_for(prompts, params)
        requests = [
            self._request(self._encode(prompt), one, adapter=adapter)
            for prompt, one in zip(prompts, each, strict=True)
        ]
        return [job.completion() for job in self._run(requests, on_progress)]

    def chat(
        self,
        conversations: Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | None = None,
        on_progress: Progress | None = None,
    ) -> list[Completion]:
        """Answer conversations through the model's chat template; each as in `generate`."""
        prompts = [self.render_chat(messages) for messages in conversations]
        return self.generate(prompts, params, adapter=adapter, on_progress=on_progress)

    def score(
        self,
        prompts: Sequence[Prompt],
        continuations: Sequence[Prompt] | None = None,
        *,
        adapter: str | None = None,
        on_progress: Progress | None = None,
    ) -> list[Score]:
        """How likely texts are: of each prompt as a whole, or of the continuation that follows it.

        Without continuations a prompt's first token, which nothing precedes, is not scored: at
        least two tokens are needed. A continuation is tokenized by itself.

        Raises:
            RequestError: as `generate`; or a text is too short to be scored.
        """
        if continuations is not None and len(continuations) != len(prompts):
            raise RequestError(f"{len(continuations)} continuations for {len(prompts)} prompts")
        given = [self._encode(prompt) for prompt in prompts]
        tails: list[list[int]] = [[] for _ in prompts]
        if continuations is not None:
            tails = [self._encode(text, add_special_tokens=False) for text in continuations]
        counts = [1 if continuations is None else len(ids) for ids in given]
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        requests = []
        for ids, tail, count in zip(given, tails, counts, strict=True):
            if not count or len(ids) + len(tail) <= count:
                raise RequestError("a text to be scored needs a token, and one before it")
            requests.append(self._request(ids + tail, params, adapter=adapter))
        jobs = self._run(requests, on_progress)
        return [job.score(count) for job, count in zip(jobs, counts, strict=True)]

    def embed(
        self,
        prompts: Sequence[Prompt],
        *,
        pooling: Pooling | str = Pooling.MEAN,
        normalize: bool = True,
        adapter: str | None = None,
        on_progress: Progress | None = None,
    ) -> list[list[float]]:
        """A vector for each prompt, [hidden_size]: final hidden states, pooled.

        Args:
            prompts: Texts, or lists of token ids.
            pooling: `mean` over all tokens, or the `last` one's.
            normalize: Whether vectors are scaled to length 1.
            adapter: Name of a LoRA adapter; None: the base model.
            on_progress: As in `generate`.

        Raises:
            RequestError: as `generate`.
            ConfigError: an unknown pooling.
        """
        if pooling not in list(Pooling):
            raise ConfigError(f"pooling must be mean or last, got {pooling!r}")
        requests = [
            self._request(
                self._encode(prompt), SamplingParams(), adapter=adapter, pooling=Pooling(pooling)
            )
            for prompt in prompts
        ]
        vectors = [job.vector() for job in self._run(requests, on_progress)]
        return [_normalized(vector) for vector in vectors] if normalize else vectors

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> Iterator[TextDelta]:
        """Answer one prompt piece by piece; leaving the loop early aborts it.

        Raises `RequestError` for more than one choice: pieces of several would be mixed.
        """
        params = params or SamplingParams()
        if params.n != 1:
            raise RequestError(f"a stream has one choice, not n={params.n}", param="n")
        request = self._request(self._encode(prompt), params, adapter=adapter)
        self.engine.add_request(request)
        open_jobs = {request.request_id: Job(self.tokenizer, request)}
        try:
            while open_jobs:
                yield from self._step(open_jobs)
        finally:
            self._abort(open_jobs)

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

    def _encode(self, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        return list(prompt)

    def _request(
        self,
        token_ids: list[int],
        params: SamplingParams,
        *,
        adapter: str | None,
        pooling: Pooling | None = None,
    ) -> Request:
        self._num_requests += 1
        return Request(
            request_id=f"llm-{self._num_requests}",
            prompt_token_ids=token_ids,
            sampling_params=params,
            seed=params.seed if params.seed is not None else secrets.randbelow(MAX_SEED + 1),
            arrival_time=time.monotonic(),
            adapter=adapter,
            pooling=pooling,
        )

    def _run(self, requests: list[Request], on_progress: Progress | None) -> list[Job]:
        """All of them to their ends, or none if one cannot be served."""
        jobs = {request.request_id: Job(self.tokenizer, request) for request in requests}
        open_jobs: dict[str, Job] = {}
        try:
            for request in requests:
                self.engine.add_request(request)
                open_jobs[request.request_id] = jobs[request.request_id]
            while open_jobs:
                self._step(open_jobs)
                if on_progress is not None:
                    num_tokens = sum(job.num_tokens for job in jobs.values())
                    on_progress(len(jobs) - len(open_jobs), num_tokens)
        finally:
            self._abort(open_jobs)
        return list(jobs.values())

    def _step(self, open_jobs: dict[str, Job]) -> list[TextDelta]:
        """One step for all; jobs that ended leave the table."""
        deltas = []
        for output in self.engine.step(time.monotonic()):
            job = open_jobs.get(output.request_id)
            if job is None:
                continue  # the last outputs of a stream that was left early
            if output.error is not None:
                raise EngineError(output.error)
            deltas.append(job.take(output))
            if job.processors[output.choice_index].stopped and output.finish_reason is None:
                self.engine.finish(output.request_id, output.choice_index)
            if job.is_done:
                del open_jobs[output.request_id]
        return deltas

    def _abort(self, open_jobs: dict[str, Job]) -> None:
        for request_id in open_jobs:
            self.engine.abort(request_id)


def _normalized(vector: list[float]) -> list[float]:
    length = math.sqrt(math.fsum(value * value for value in vector))
    return [value / length for value in vector] if length else vector
