"""The situations in which a request must get the same answer, and what counts as the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmserve.completion import Completion
from llmserve.engine.config import SpeculationConfig
from llmserve.llm import LLM
from llmserve.runners.philox import RANDOM_BITS, random_number
from llmserve.sampling import SamplingParams

__all__ = ["NEIGHBOURS", "Situation", "answer_in", "first_difference", "is_close_call"]

NUM_TOKENS = 24
SEED = 5
MAX_SEQ_LEN = 128
BLOCK_BYTES = 16 * 2 * 2 * 2 * 8 * 4  # tokens, keys and values, layers, heads, width, bytes

NEIGHBOURS = [[(7 * i + 5 * j) % 300 + 3 for j in range(1 + (11 * i) % 60)] for i in range(63)]
"""Prompts of others, token ids without meaning."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What surrounds the request under test."""

    batch_size: int
    """Requests at once, its own included."""
    is_chunked: bool
    """Prompts are computed in pieces of 16 tokens, not whole."""
    is_hit: bool
    """The prompt was asked before."""
    is_starved: bool
    """The cache holds a quarter of what all need."""
    is_streamed: bool
    speculation: str
    """`off`; `on`; `switching` by itself; `draft`: by another model, always."""


def answer_in(
    situation: Situation, folder: Path, draft: Path, prompt: list[int], params: SamplingParams,
    *, runner: str, dtype: str | None = None, deterministic: bool = False,
) -> tuple[Completion, int]:  # fmt: skip
    """The answer to `prompt` in a situation, and how often anybody was preempted."""
    others = NEIGHBOURS[: situation.batch_size - 1]
    need = sum(-(-(len(ids) + NUM_TOKENS) // 16) for ids in [prompt, *others])
    num_blocks = max(MAX_SEQ_LEN // 16, need // 4 if situation.is_starved else 4 * need)
    speculation = None
    if situation.speculation != "off":
        speculation = SpeculationConfig(
            method="draft" if situation.speculation == "draft" else "ngram",
            num_draft_tokens=4,
            min_ngram=1,
            is_always_on=situation.speculation != "switching",
        )
    has_draft = situation.speculation == "draft"
    with LLM(
        folder,
        runner=runner,
        dtype=dtype,
        deterministic=deterministic,
        max_seq_len=MAX_SEQ_LEN,
        max_num_seqs=situation.batch_size if situation.is_chunked else 64,
        max_batched_tokens=max(16, situation.batch_size) if situation.is_chunked else 4096,
        cache_bytes=num_blocks * BLOCK_BYTES * (2 if has_draft else 1),
        speculation=speculation,
        draft_model=draft if has_draft else None,
    ) as llm:
        if situation.is_hit:
            llm.generate([prompt], params)
        completion = _ask(llm, situation, prompt, others, params)
        return completion, llm.engine.stats().num_preemptions


def _ask(
    llm: LLM, situation: Situation, prompt: list[int], others: list[list[int]],
    params: SamplingParams,
) -> Completion:  # fmt: skip
    if not situation.is_streamed:
        each = [SamplingParams(max_tokens=NUM_TOKENS, temperature=0.8, seed=i) for i in range(64)]
        everybody = llm.generate([*others, prompt], [*each[: len(others)], params])
        return everybody[-1]
    pieces = list(llm.stream(prompt, params))
    whole = llm.generate([prompt], params)[0]
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [i for piece in pieces for i in piece.token_ids] == whole.choices[0].token_ids
    logprobs = [entry for piece in pieces for entry in piece.logprobs]
    assert len(logprobs) == len(whole.choices[0].token_ids)
    return whole


def first_difference(one: list[int], two: list[int]) -> int | None:
    """The first place where two answers differ."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b), None)


def is_close_call(
    reference: Completion, place: int, params: SamplingParams, tolerance: float
) -> bool:
    """Whether rounding may decide which token stands at `place` of the reference.

    Greedy: the two largest logits lie within `tolerance`. Seeded: the uniform number lies so near
    to an end of the drawn token's interval. The reference carries all logprobs.
    """
    top = reference.choices[0].logprobs[place].top
    if params.is_greedy:
        return top[0][1] - top[1][1] < tolerance
    ids, values = (np.array(column) for column in zip(*sorted(top), strict=True))
    weights = np.exp(values.astype(np.float64) / params.temperature)
    ends = np.cumsum(weights / weights.sum())
    position = len(reference.prompt_token_ids) + place
    number = random_number(SEED, 0, position) / 2**RANDOM_BITS
    assert len(ids) == len(ends)
    return bool(np.abs(ends - number).min() < tolerance)
