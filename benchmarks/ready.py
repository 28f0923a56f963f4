"""Before the load: wait for the server, learn its model, and find out what requests it takes.

Nothing here is measured. One request is always sent first, so that a wrong option or a dead
server gives one clear line instead of a thousand failures, and so that the two things servers
differ in are settled before the clock runs: whether they count tokens when asked
(`stream_options.include_usage`), and whether they take prompts as token ids.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from llmserve.errors import ConfigError

from .client import Client, ServerError
from .record import RequestRecord
from .workload import Prompt, align_to_text

__all__ = ["ServedModel", "align_all", "choose_model", "first_request", "list_models"]

RETRY_S = 0.5
ALIGN_CONCURRENCY = 16
REFUSALS = ("http_400", "http_422")
NOT_YET = ("connection", "http_503")

Announce = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What `/v1/models` says of the model under test."""

    name: str
    vocab_size: int | None = None
    """Number of token ids; None: it does not say."""
    max_model_len: int | None = None
    """Tokens of context; None: it does not say."""


async def list_models(client: Client, *, deadline_s: float) -> list[dict[str, object]]:
    """The models listed, asked again until `deadline_s` (`time.monotonic`) while it is not ready.

    Raises:
        ServerError: no answer by then, or an answer that waiting does not change.
    """
    while True:
        try:
            return await client.models()
        except ServerError as error:
            is_final = error.status is not None and error.status < 500
            if is_final or time.monotonic() + RETRY_S > deadline_s:
                raise
        await asyncio.sleep(RETRY_S)


def choose_model(models: Sequence[dict[str, object]], asked: str | None) -> ServedModel:
    """The model named `asked`, or else the first one listed.

    Raises:
        ConfigError: nothing is listed and nothing was asked for.
    """
    if asked is None and not models:
        raise ConfigError("the server lists no model: name one with --model")
    entry = next((model for model in models if asked in (None, model.get("id"))), {})
    meta = entry.get("meta")  # llama.cpp's server tells sizes there
    meta = meta if isinstance(meta, dict) else {}
    return ServedModel(
        name=asked if asked is not None else str(entry.get("id")),
        vocab_size=_count(entry.get("vocab_size")) or _count(meta.get("n_vocab")),
        max_model_len=_count(entry.get("max_model_len")),
    )


async def first_request(
    client: Client, prompt: Prompt, *, deadline_s: float, announce: Announce
) -> bool:
    """Send `prompt` until it succeeds, asking for less where the server refuses.

    Sets `client.target.include_usage` to what the server takes. Returns whether it takes this
    kind of prompt: False means that ids were refused and text should be tried.

    Raises:
        ServerError: it failed for another reason, or still does at `deadline_s`.
    """
    while True:
        record = await client.complete(prompt)
        if record.is_success:
            return True
        if record.error_kind in REFUSALS and _refuses_usage(record, client):
            announce("the server does not count tokens in streams: each chunk counts as one token")
            client.target = replace(client.target, include_usage=False)
        elif record.error_kind in REFUSALS and not isinstance(prompt.content, str):
            announce(f"the server refuses prompts of token ids ({record.error}): trying text")
            return False
        elif record.error_kind in NOT_YET and time.monotonic() + RETRY_S < deadline_s:
            await asyncio.sleep(RETRY_S)
        else:
            url = client.target.base_url + client.target.endpoint
            raise ServerError(f"the first request to {url} failed: {record.error}")


async def align_all(client: Client, prompts: Sequence[Prompt], announce: Announce) -> list[Prompt]:
    """`prompts` of ids as texts of the same length by the server's own tokenizer.

    Raises:
        ServerError: the server has no `/tokenize` and `/detokenize`.
    """
    gate = asyncio.Semaphore(ALIGN_CONCURRENCY)

    async def align(prompt: Prompt) -> Prompt:
        async with gate:
            return await align_to_text(prompt, client)

    try:
        aligned = await asyncio.gather(*(align(prompt) for prompt in prompts))
    except ServerError as error:
        raise ServerError(
            f"random prompts as text need the server's /tokenize and /detokenize ({error}); "
            "use --dataset-name text, or the completions endpoint with token ids",
            status=error.status,
        ) from error
    pairs = zip(prompts, aligned, strict=True)
    inexact = sum(before.num_tokens != after.num_tokens for before, after in pairs)
    if inexact:
        announce(f"{inexact} of {len(prompts)} prompts could not be made exactly as long as asked")
    return list(aligned)


def _refuses_usage(record: RequestRecord, client: Client) -> bool:
    return client.target.include_usage and (
        "stream_options" in record.error or "include_usage" in record.error
    )


def _count(value: object) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    return None
