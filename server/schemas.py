"""The requests of every route, as strict types: nothing is coerced and nothing is skipped.

Pydantic checks the types of single values and describes them in the OpenAPI document. Lists that
a client fills are checked by loops that stop at the first fault (`field_values.py`): a body of a
megabyte can hold a hundred thousand of them. Ranges are the business of `SamplingParams`, lengths
of lists that of `Limits`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
)

from llmserve.errors import RequestError
from llmserve.sampling import SamplingParams

from .field_values import LogitBias, Prompts, StopStrings, TokenIds
from .fields import CHAT_ONLY, COMPLETION_ONLY, UNSUPPORTED, sort_fields

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "GenerationRequest",
    "Message",
    "StreamOptions",
    "TokenizeRequest",
    "parse_request",
]

M = TypeVar("M", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def _parse_messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError("takes a list of at least one message")
    return [_parse_message(item, index) for index, item in enumerate(value)]


def _parse_message(item: Any, index: int) -> Message:
    where = f"messages[{index}]"
    if not isinstance(item, dict):
        raise ValueError(f"must hold objects; {where} is none")
    for name in item:
        if name not in Message.model_fields and item[name] is not None:
            raise ValueError(f"{where}.{name[:64]} is not supported by this server")
    known = {name: item[name] for name in item if name in Message.model_fields}
    if isinstance(known.get("content"), list):
        known["content"] = _join_parts(known["content"], where)
    try:
        return Message.model_validate(known)
    except ValidationError as error:
        raise ValueError(f"{where}.{_first_fault(error)[1]}") from error


def _join_parts(parts: list[Any], where: str) -> str:
    """The text of a content that comes as a list of parts."""
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ValueError(f"{where}.content may hold parts of type 'text' only")
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError(f"{where}.content holds a part that is not {{type, text}}")
    return "".join(part["text"] for part in parts)


def _check_stream_options(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    for name in value:
        if name not in StreamOptions.model_fields:
            raise ValueError(f"has no option {name[:64]!r}")
    return {name: option for name, option in value.items() if option is not None}


_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_MESSAGES_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant"]},
            "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA}]},
            "name": {"type": "string"},
        },
        "required": ["role", "content"],
        "additionalProperties": False,
    },
}
_STREAM_OPTIONS_SCHEMA = {
    "type": "object",
    "properties": {
        "include_usage": {"type": "boolean"},
        "continuous_usage_stats": {"type": "boolean"},
    },
    "additionalProperties": False,
}


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str
    name: str | None = None


class StreamOptions(_Strict):
    """What a stream tells besides the text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(_Strict):
    """What completions and chat have in common."""

    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: LogitBias = Field(default_factory=dict)
    stop: StopStrings = ()
    stop_token_ids: TokenIds = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
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
        return SamplingParams(
            max_tokens=self.token_budget(),
            min_tokens=self.min_tokens,
            n=self.n,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            include_stop=self.include_stop_str_in_output,
            logprobs=self.num_logprobs(),
            seed=self.seed,
        )

    def token_budget(self) -> int | None:
        """Most tokens asked for; None: the route's default."""
        return self.max_tokens

    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Alternatives to report for each token; None: no log-probabilities."""


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: Prompts
    echo: bool = False
    logprobs: int | None = None
    add_special_tokens: bool = True

    def num_logprobs(self) -> int | None:
        """The field `logprobs`; not together with `echo`, which would ask for the prompt's."""
        if self.echo and self.logprobs is not None:
            raise RequestError(
                "logprobs of the prompt are not supported: leave out echo or logprobs",
                param="logprobs",
            )
        return self.logprobs


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[
        list[Message], PlainValidator(_parse_messages), WithJsonSchema(_MESSAGES_SCHEMA)
    ]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    add_generation_prompt: bool = True

    def token_budget(self) -> int | None:
        """`max_completion_tokens`, or its older name."""
        if self.max_completion_tokens is None:
            return self.max_tokens
        if self.max_tokens not in (None, self.max_completion_tokens):
            raise RequestError(
                "max_tokens and max_completion_tokens differ: give one", param="max_tokens"
            )
        return self.max_completion_tokens

    def num_logprobs(self) -> int | None:
        """`top_logprobs` where `logprobs` is true."""
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        return None


class TokenizeRequest(_Strict):
    """`POST /tokenize`: a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[
        list[Message] | None, PlainValidator(_parse_messages), WithJsonSchema(_MESSAGES_SCHEMA)
    ] = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(_Strict):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: TokenIds


_UNSUPPORTED: Mapping[type[BaseModel], Mapping[str, tuple[Any, ...]]] = {
    CompletionRequest: {**UNSUPPORTED, **COMPLETION_ONLY},
    ChatRequest: {**UNSUPPORTED, **CHAT_ONLY},
}


def parse_request(
    model: type[M], body: Mapping[str, Any], *, ignore_unknown: bool = False
) -> tuple[M, list[str]]:
    """The request in `body`, and the names of fields that were accepted without effect.

    Raises `RequestError` naming the first field at fault.
    """
    fields, ignored = sort_fields(
        body,
        known=model.model_fields,
        unsupported=_UNSUPPORTED.get(model, {}),
        ignore_unknown=ignore_unknown,
    )
    try:
        return model.model_validate(fields), ignored
    except ValidationError as error:
        param, message = _first_fault(error)
        raise RequestError(message, param=param) from error


_SENTENCES = {
    "missing": "is required",
    "extra_forbidden": "is not known",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "model_type": "must be an object",
}


def _first_fault(error: ValidationError) -> tuple[str, str]:
    """The field at fault, and a sentence about it that does not quote the input."""
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    path = ".".join(str(part)[:64] for part in fault["loc"])
    message = fault["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    message = _SENTENCES.get(fault["type"], message)
    return path, message if message.startswith(path) else f"{path} {message}"
