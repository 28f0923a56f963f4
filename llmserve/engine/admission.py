"""What may enter the engine: one check, used by the server before queueing and by the engine."""

from __future__ import annotations

from ..errors import PromptTooLongError, RequestError
from ..sampling import check_token_ids
from .request import Request

__all__ = ["check_request", "resolve_max_len"]


def check_request(request: Request, *, vocab_size: int, max_seq_len: int) -> None:
    """Raise `RequestError` unless `request` can be served to its end.

    `vocab_size` is the width of the model's output, `max_seq_len` the longest sequence that the
    context and the KV cache hold; both numbers are in the message where they are exceeded.
    """
    prompt, params = request.prompt_token_ids, request.sampling_params
    if not prompt:
        raise RequestError("the prompt is empty: give at least one token", param="prompt")
    if len(prompt) >= max_seq_len:
        raise PromptTooLongError(prompt_tokens=len(prompt), limit=max_seq_len - 1)
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


def resolve_max_len(request: Request, max_seq_len: int) -> int:
    """Length at which a sequence of `request` ends: the context's end unless it asks for less."""
    max_tokens = request.sampling_params.max_tokens
    if max_tokens is None:
        return max_seq_len
    return len(request.prompt_token_ids) + max_tokens


def _check_outputs(request: Request, vocab_size: int, max_seq_len: int) -> None:
    """A resumed request: as many lists as choices, each short of the request's end."""
    made = request.output_token_ids
    if made and len(made) != request.sampling_params.n:
        raise RequestError(
            f"{len(made)} lists of output ids were given for {request.sampling_params.n} choices",
            param="output_token_ids",
        )
    most = resolve_max_len(request, max_seq_len) - len(request.prompt_token_ids)
    for token_ids in made:
        if len(token_ids) >= most:
            raise RequestError(
                f"{len(token_ids)} output ids were given; the request ends at {most}",
                param="output_token_ids",
            )
        check_token_ids(token_ids, vocab_size, param="output_token_ids")
