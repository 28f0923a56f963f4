"""The requests of every route, as strict types: nothing is coerced and nothing is skipped.

Pydantic checks the types of single values and describes them in the OpenAPI document. Lists that
a client fills are checked by loops that stop at the first fault (`field_values.py`): a body of a
megabyte can hold a hundred thousand of them. Ranges are the business of `SamplingParams`, lengths
of lists that of `Limits`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    WithJsonSchema,
)

from llmserve.engine.grammar import Grammar
from llmserve.errors import RequestError
from llmserve.limits import Limits
from llmserve.sampling import SamplingParams

from .conversations import Messages
from .field_values import LogitBias, Prompts, StopStrings, TokenIds
from .fields import COMPLETION_ONLY, UNSUPPORTED, sort_fields
from .grammar_fields import ResponseFormat, StructuredOutputs, check_grammar
from .validation import Strict, first_fault

__all__ = [
    "CompletionRequest",
    "DetokenizeRequest",
    "GenerationRequest",
    "ModelRequest",
    "StreamOptions",
    "TokenizeRequest",
    "parse_request",
]

M = TypeVar("M", bound=BaseModel)


def _check_stream_options(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    for name in value:
        if name not in StreamOptions.model_fields:
            raise ValueError(f"has no option {name[:64]!r}")
    return {name: option for name, option in value.items() if option is not None}


_STREAM_OPTIONS_SCHEMA = {
    "type": "object",
    "properties": {
        "include_usage": {"type": "boolean"},
        "continuous_usage_stats": {"type": "boolean"},
    },
    "additionalProperties": False,
}


class StreamOptions(Strict):
    """What a stream tells besides the text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class ModelRequest(Strict):
    """What every request has that a model answers."""

    model: str | None = None


class GenerationRequest(ModelRequest):
    """What completions and chat have in common."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSUPPORTED
    """Known fields that are not served, with the values of each that ask for nothing."""

    max_tokens: int | None = None
    min_tokens: int = 0
    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: LogitBias = Field(default_factory=dict)
    allowed_token_ids: TokenIds | None = None
    banned_token_ids: TokenIds = ()
    stop: StopStrings = ()
    stop_token_ids: TokenIds = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    priority: int = Field(default=0, ge=-(2**31), lt=2**31)
    cache_salt: str = ""
    response_format: ResponseFormat = None
    structured_outputs: StructuredOutputs = None
    timing: bool = False
    stream: bool = False
    stream_options: Annotated[
        StreamOptions | None,
        BeforeValidator(_check_stream_options),
        WithJsonSchema(_STREAM_OPTIONS_SCHEMA),
    ] = None

    def sampling_params(self) -> SamplingParams:
        """As the engine wants it.

        Raises `RequestError` for a value out of range or options that do not fit together.
        """
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream: true", param="stream_options")
        budget = self.token_budget()
        if budget == 0 and not self.asks_for_prompt():
            raise RequestError(
                "max_tokens is 0, which generates nothing: ask for at least 1 token, or in a "
                "completion for the prompt's, with echo or prompt_logprobs",
                param="max_tokens",
            )
        return SamplingParams(
            max_tokens=budget,
            min_tokens=self.min_tokens,
            n=self.n,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            typical_p=self.typical_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias,
            allowed_token_ids=self.allowed_token_ids,
            banned_token_ids=self.banned_token_ids,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            include_stop=self.include_stop_str_in_output,
            logprobs=self.num_logprobs(),
            prompt_logprobs=self.num_prompt_logprobs(),
            seed=self.seed,
        )

    def grammar(self, limits: Limits) -> Grammar | None:
        """What the text must match; None: anything.

        Raises `RequestError` where it is asked for in two ways, or above a limit.
        """
        if self.response_format is not None and self.structured_outputs is not None:
            raise RequestError(
                "response_format and structured_outputs say the same in two ways: give one",
                param="structured_outputs",
            )
        return check_grammar(self.structured_outputs or self.response_format, limits)

    def token_budget(self) -> int | None:
        """Most tokens asked for; None: the route's default."""
        return self.max_tokens

    def asks_for_prompt(self) -> bool:
        """Whether the reply tells of the prompt, so that it needs no generated token."""
        return False

    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Alternatives to report for each token; None: no log-probabilities."""

    def num_prompt_logprobs(self) -> int | None:
        """The same for the prompt's tokens."""
        return None


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {**UNSUPPORTED, **COMPLETION_ONLY}

    prompt: Prompts
    echo: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    add_special_tokens: bool = True

    @property
    def echoes_logprobs(self) -> bool:
        """Whether `logprobs` of the reply begin with the prompt's."""
        return self.echo and self.logprobs is not None

    def asks_for_prompt(self) -> bool:
        """By `echo` or `prompt_logprobs`."""
        return self.echo or self.prompt_logprobs is not None

    def num_logprobs(self) -> int | None:
        """The field `logprobs`."""
        return self.logprobs

    def num_prompt_logprobs(self) -> int | None:
        """As many as the fields that report them need."""
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in asked if count is not None), default=None)


class TokenizeRequest(ModelRequest):
    """`POST /tokenize`: a text or a conversation."""

    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class LoadModelRequest(Strict):
    """`POST /admin/models/load`: the folder to serve; without one, the served folder anew.

    `name` is that of the model whose place it takes; without one, the only one's.
    """

    model: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    name: str | None = None


class DetokenizeRequest(ModelRequest):
    """`POST /detokenize`."""

    tokens: TokenIds


def parse_request(
    model: type[M], body: Mapping[str, Any], *, ignore_unknown: bool = False
) -> tuple[M, list[str]]:
    """The request in `body`, and the names of fields that were accepted without effect.

    Raises `RequestError` naming the first field at fault.
    """
    fields, ignored = sort_fields(
        body,
        known=model.model_fields,
        unsupported=getattr(model, "unsupported", {}),
        ignore_unknown=ignore_unknown,
    )
    try:
        return model.model_validate(fields), ignored
    except ValidationError as error:
        param, message = first_fault(error)
        raise RequestError(message, param=param) from error
