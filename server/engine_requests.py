"""From what an HTTP request asks to what the engine is given: one engine request for each prompt.

Here the request gets its random key, and the prefix cache's salt: who may share what with whom.
"""

from __future__ import annotations

import hashlib
import secrets
import uuid
from collections.abc import Sequence

from llmserve.engine.request import Request
from llmserve.limits import Limits
from llmserve.sampling import MAX_SEED, SamplingParams

from .schemas import GenerationRequest

__all__ = ["cache_salt", "make_requests"]


def make_requests(
    asked: GenerationRequest,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    *,
    tenant: str,
    shares_prefix_cache: bool,
    adapter: str | None,
    arrival_time: float,
    limits: Limits,
) -> list[Request]:
    """One for each prompt, each with random numbers of its own.

    Args:
        asked: The request's other fields.
        prompts: Token ids.
        params: As asked for, defaults filled in.
        tenant: On whose account they run.
        shares_prefix_cache: Whether other tenants may use the blocks.
        adapter: The LoRA adapter that the request names as its model.
        arrival_time: On the engine's clock.
        limits: For the deadline and the grammar.
    """
    salt = cache_salt("" if shares_prefix_cache else tenant, asked.cache_salt)
    return [
        Request(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=prompt,
            sampling_params=params,
            seed=params.seed if params.seed is not None else secrets.randbelow(MAX_SEED + 1),
            arrival_time=arrival_time,
            priority=asked.priority,
            tenant=tenant,
            cache_salt=salt,
            adapter=adapter,
            grammar=asked.grammar(limits),
            deadline=arrival_time + limits.max_deadline_s,
        )
        for prompt in prompts
    ]


def cache_salt(tenant: str, own: str) -> str:
    """What requests must have in common to share prefix-cache blocks.

    A tenant's name is hexadecimal, so the first slash ends it: no request's own salt can reach
    another tenant's blocks. The own salt may be of any length and is kept as a digest.
    """
    digest = hashlib.sha256(own.encode()).hexdigest() if own else ""
    return f"{tenant}/{digest}"
