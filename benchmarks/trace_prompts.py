"""Prompts for recorded traffic: a trace names lengths and shared blocks, never words.

Blocks of equal key hold equal random ids, whichever request they stand in, so a server's prefix
cache hits where the recorded one could have. Prompts without keys are drawn anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .traces import Trace, TraceRequest
from .workload import Prompt

__all__ = ["trace_prompts"]

Ids = npt.NDArray[np.int64]


def trace_prompts(trace: Trace, ids: Sequence[int], *, seed: int) -> list[Prompt]:
    """The prompts of all requests, of ids drawn from `ids`; the same arguments give the same.

    Raises:
        DataError: a line of the trace cannot be used.
    """
    pool = np.asarray(ids, dtype=np.int64)
    return [
        Prompt(
            index=index,
            content=_content(request, index, trace.block_size, pool, seed),
            num_tokens=request.input_len,
            output_len=request.output_len,
        )
        for index, request in enumerate(trace)
    ]


def _content(
    request: TraceRequest, index: int, block_size: int | None, pool: Ids, seed: int
) -> list[int]:
    if request.block_keys is None or block_size is None:
        return _draw(pool, request.input_len, (seed, 0, index))
    blocks = [_draw(pool, block_size, (seed, 1, key)) for key in request.block_keys]
    return [token for block in blocks for token in block][: request.input_len]


def _draw(pool: Ids, count: int, key: tuple[int, int, int]) -> list[int]:
    ids: list[int] = np.random.default_rng(key).choice(pool, size=count).tolist()
    return ids
