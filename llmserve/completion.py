"""What `LLM` answers, and the request behind each answer while it is on its way."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .engine.request import FinishReason, Request, RequestOutput
from .errors import EngineError
from .output import OutputProcessor, TextDelta
from .runners.protocol import TokenLogprobs
from .text.tokenizer import Tokenizer

__all__ = ["Choice", "Completion", "Job", "Score"]


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
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Where asked for: entry i is of prompt token i + 1; nothing precedes the first."""
    num_cached_tokens: int = field(default=0, compare=False)
    """Prompt tokens that the prefix cache had: not part of the answer, so not compared."""

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How likely a text is to the model."""

    token_ids: list[int]
    """The tokens that were scored."""
    logprobs: list[float]
    """Natural logarithm of each one's probability after all before it."""

    @property
    def logprob(self) -> float:
        """Of the whole: the sum."""
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp of the mean loss per token."""
        return math.exp(-self.logprob / len(self.logprobs))


class Job:
    """A request on its way, with the text of each choice so far."""

    def __init__(self, tokenizer: Tokenizer, request: Request) -> None:
        params = request.sampling_params
        self.request = request
        self.processors = [
            OutputProcessor(tokenizer, params, request.prompt_token_ids) for _ in range(params.n)
        ]
        self._deltas: list[list[TextDelta]] = [[] for _ in range(params.n)]
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._num_cached_tokens = 0
        self._vector: list[float] | None = None

    @property
    def is_done(self) -> bool:
        """Whether every choice has ended."""
        return all(deltas and deltas[-1].finish_reason for deltas in self._deltas)

    @property
    def num_tokens(self) -> int:
        """Tokens generated so far."""
        return sum(processor.num_tokens for processor in self.processors)

    def take(self, output: RequestOutput) -> TextDelta:
        """Add the engine's next output for a choice; what it adds to the text."""
        delta = self.processors[output.choice_index].push(output)
        self._deltas[output.choice_index].append(delta)
        if output.choice_index == 0:
            self._num_cached_tokens = output.num_cached_tokens
            self._prompt_logprobs += output.prompt_logprobs
            self._vector = output.vector
        return delta

    def completion(self) -> Completion:
        """All answers; every choice has ended."""
        return Completion(
            prompt_token_ids=self.request.prompt_token_ids,
            choices=[_choice(deltas) for deltas in self._deltas],
            prompt_logprobs=self._prompt_logprobs,
            num_cached_tokens=self._num_cached_tokens,
        )

    def score(self, num_given: int) -> Score:
        """Of the prompt's tokens after the first `num_given`, at least 1."""
        return Score(
            token_ids=self.request.prompt_token_ids[num_given:],
            logprobs=[entry.logprob for entry in self._prompt_logprobs[num_given - 1 :]],
        )

    def vector(self) -> list[float]:
        """The prompt's vector, where one was asked for."""
        if self._vector is None:
            raise EngineError("a vector was read before its end")
        return self._vector


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
