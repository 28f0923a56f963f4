"""Request fields that clients of other servers send: which are refused here, and when not.

A known field that this server does not serve is refused by name, never skipped in silence; but
null, or the value that asks for nothing, is accepted, because clients send those by default. A
few fields cannot change a reply anywhere but at a large host: they are accepted and named in the
header `X-Llmserve-Ignored`.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from llmserve.errors import RequestError

__all__ = ["CHAT_ONLY", "COMPLETION_ONLY", "NO_EFFECT", "UNSUPPORTED", "sort_fields"]

NO_EFFECT = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "verbosity",
        "reasoning_effort",
    }
)
"""Accepted with any value, and reported as ignored."""

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "logprob_token_ids": ([],),
    "bad_words": ([],),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "request_id": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "stream_interval": (1,),
    "thinking_token_budget": (),
    "repetition_detection": (),
}
"""Fields of both routes that are known and not served, with the values that ask for nothing."""

COMPLETION_ONLY: Mapping[str, tuple[Any, ...]] = {"suffix": ("",)}
"""As `UNSUPPORTED`, for completions."""

CHAT_ONLY: Mapping[str, tuple[Any, ...]] = {
    "prompt_logprobs": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "chat_template": (),
    "add_special_tokens": (False,),
    "echo": (False,),
    "documents": ([],),
}
"""As `UNSUPPORTED`, for chat."""


def sort_fields(
    body: Mapping[str, Any],
    *,
    known: Collection[str],
    unsupported: Mapping[str, tuple[Any, ...]],
    ignore_unknown: bool,
) -> tuple[dict[str, Any], list[str]]:
    """The fields to honour, null ones left out, and the names of those that were ignored.

    Raises `RequestError` naming a field that is not served or not known.
    """
    fields: dict[str, Any] = {}
    ignored: list[str] = []
    for name, value in body.items():
        if name in known:
            if value is not None:
                fields[name] = value
        elif name in NO_EFFECT:
            ignored.append(name)
        elif name in unsupported:
            _check_neutral(name, value, unsupported[name])
        elif ignore_unknown:
            ignored.append(name)
        else:
            raise _unknown(name, known)
    return fields, ignored


def _check_neutral(name: str, value: Any, neutral: tuple[Any, ...]) -> None:
    if value is None or any(_is_same(value, allowed) for allowed in neutral):
        return
    raise RequestError(
        f"{name} is not supported by this server; leave it out or send {_listed(neutral)}",
        param=name,
    )


def _is_same(value: Any, allowed: Any) -> bool:
    """Equality that keeps true and 1 apart."""
    return isinstance(value, bool) == isinstance(allowed, bool) and bool(value == allowed)


def _listed(neutral: tuple[Any, ...]) -> str:
    return " or ".join(["null", *(repr(value) for value in neutral)])


def _unknown(name: str, known: Collection[str]) -> RequestError:
    close = difflib.get_close_matches(name[:64], known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return RequestError(f"unknown field {name[:64]!r}{hint}", param=name)
