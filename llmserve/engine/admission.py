"""What may enter the engine: one check, used by the server before queueing and by the engine."""

from __future__ import annotations

from ..errors import PromptTooLongError, RequestError
from ..runners.protocol import RunnerInfo
from ..sampling import check_token_ids
from .config import EngineConfig
from .request import Request

__all__ = ["check_request", "draws", "resolve_max_len"]


def check_request(request: Request, info: RunnerInfo, config: EngineConfig) -> None:
    """Raise `RequestError` unless `request` can be served to its end.

    The longest sequence is what context and KV cache hold; where it is exceeded, both numbers are
    in the message.
    """
    vocab_size, max_seq_len = info.vocab_size, config.max_seq_len
    prompt, params = request.prompt_token_ids, request.sampling_params
    if not prompt:
        raise RequestError("the prompt is empty: give at least one token", param="prompt")
    limit = max_seq_len - 1 if draws(request) else max_seq_len
    if len(prompt) > limit:
        raise PromptTooLongError(prompt_tokens=len(prompt), limit=limit)
    if params.max_tokens is not None and len(prompt) + params.max_tokens > max_seq_len:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens and max_tokens is {params.max_tokens}: together "
            f"above the {max_seq_len} that this model holds; ask for at most "
            f"{max_seq_len - len(prompt)}",
            param="max_tokens",
        )
    check_token_ids(prompt, vocab_size, param="prompt")
    params.check_token_ids(vocab_size)
    _check_outputs(request, vocab_size, max_seq_len)
    _check_features(request, info, config)


def resolve_max_len(request: Request, max_seq_len: int) -> int:
    """Length at which a sequence of `request` ends: the context's end unless it asks for less."""
    max_tokens = request.sampling_params.max_tokens
    if max_tokens is None:
        return max_seq_len
    return len(request.prompt_token_ids) + max_tokens


def draws(request: Request) -> bool:
    """Whether tokens are generated at all."""
    is_read = request.pooling is not None or request.scoring is not None
    return not is_read and request.sampling_params.max_tokens != 0


def _check_features(request: Request, info: RunnerInfo, config: EngineConfig) -> None:
    """What the runner and the policy in force can do for a request."""
    if request.adapter is not None and request.adapter not in info.adapters:
        raise RequestError(
            f"the adapter {request.adapter[:64]!r} is not loaded; loaded: "
            f"{', '.join(info.adapters) or 'none'}",
            param="model",
        )
    if request.priority and config.policy == "fcfs":
        raise RequestError(
            "priority has no effect under the scheduling policy fcfs: leave it out, or start the "
            "engine with the policy priority or fair",
            param="priority",
        )
    _check_kind(request, info)
    if request.grammar is not None:
        _check_grammar(request, info)
    params = request.sampling_params
    ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(info.eos_token_ids))
    allowed = set(params.allowed_token_ids or ()) - set(params.banned_token_ids)
    if params.min_tokens and allowed and ends.issuperset(allowed):
        raise RequestError(
            "allowed_token_ids leaves end ids alone, and min_tokens forbids those: allow another "
            "id or leave out min_tokens",
            param="min_tokens",
        )
    num_blocks = -(-len(request.prompt_token_ids) // config.block_size)
    if request.block_keys is not None and len(request.block_keys) != num_blocks:
        raise RequestError(
            f"{len(request.block_keys)} block keys were given for a prompt of {num_blocks} blocks",
            param="block_keys",
        )


def _check_kind(request: Request, info: RunnerInfo) -> None:
    """Text, a vector or scores: what the model and its runner give."""
    if request.pooling is not None and not info.hidden_size:
        raise RequestError(f"the {info.runner} runner gives no vectors", param="pooling")
    if request.scoring is not None and not info.labels:
        raise RequestError(
            "this model has no head with labels: it cannot classify or find answers", param="model"
        )
    is_read = request.pooling is not None or request.scoring is not None
    if not is_read and info.head is not None:
        raise RequestError(
            f"this model has a head ({info.head}) in place of an output layer: it gives scores, "
            "not text",
            param="model",
        )
    if is_read and request.sampling_params.n != 1:
        raise RequestError("a vector or a score has one choice: leave n at 1", param="n")


def _check_grammar(request: Request, info: RunnerInfo) -> None:
    """A text that must match something has to be able to end."""
    params = request.sampling_params
    if not info.eos_token_ids:
        raise RequestError(
            "structured output needs a model with an end id, which this one has not",
            param=request.grammar.param if request.grammar else None,
        )
    if params.ignore_eos or params.min_tokens:
        name = "ignore_eos" if params.ignore_eos else "min_tokens"
        raise RequestError(
            f"structured output ends where its grammar does: leave {name} out", param=name
        )
    if not draws(request):
        raise RequestError("structured output needs at least one token", param="max_tokens")


def _check_outputs(request: Request, vocab_size: int, max_seq_len: int) -> None:
    """A resumed request: as many lists as choices, each open one short of the request's end."""
    made, ended = request.output_token_ids, set(request.ended_choices)
    if ended and not ended < set(range(request.sampling_params.n)):
        raise RequestError(
            f"{len(ended)} choices of {request.sampling_params.n} are said to have ended: give "
            "some of them, and leave one to go on with",
            param="ended_choices",
        )
    if made and len(made) != request.sampling_params.n:
        raise RequestError(
            f"{len(made)} lists of output ids were given for {request.sampling_params.n} choices",
            param="output_token_ids",
        )
    most = resolve_max_len(request, max_seq_len) - len(request.prompt_token_ids)
    for index, token_ids in enumerate(made):
        if index in ended or not token_ids:
            continue
        if len(token_ids) >= most:
            raise RequestError(
                f"{len(token_ids)} output ids were given; the request ends at {most}",
                param="output_token_ids",
            )
        check_token_ids(token_ids, vocab_size, param="output_token_ids")
