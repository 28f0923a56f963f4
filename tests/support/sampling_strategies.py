"""Strategies of logits and sampling rows: ties, exact shares, extremes, every parameter."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from llmserve.errors import RequestError
from llmserve.runners.protocol import MaskArray, SamplingRow, TokenLogprobs
from llmserve.sampling import MAX_SEED, SamplingParams

__all__ = ["batches", "check_entry", "sampling_rows", "wide_batches"]

LARGEST = float(np.finfo(np.float32).max)

# Few values make ties, round ones exact shares; the rest is whatever float32 holds.
logit = st.one_of(
    st.sampled_from([-math.inf, -LARGEST, -1.0, -0.0, 0.0, 1e-45, 1.0, 2.0, LARGEST]),
    st.floats(-20, 20, width=32),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)
broken_logit = st.one_of(logit, logit, logit, st.sampled_from([math.nan, math.inf]))


def share(*others: float) -> st.SearchStrategy[float]:
    """A fraction above 0 and up to 1, often one that sums of equal tokens reach exactly."""
    exact = st.sampled_from([0.1, 0.2, 0.25, 0.3, 0.5, 0.7, 0.75, 0.9, 1.0, *others])
    return exact | st.floats(1e-12, 1.0)


@st.composite
def sampling_rows(draw: st.DrawFn, vocab_size: int) -> SamplingRow:
    token_id = st.integers(0, vocab_size - 1)
    ids = st.lists(token_id, max_size=4).map(tuple)
    tokens = draw(st.lists(token_id, min_size=1, max_size=30))
    try:
        params = SamplingParams(
            temperature=draw(st.sampled_from([0.0, 1e-320, 0.5, 1.0, 1.0]) | st.floats(0, 100)),
            top_k=draw(st.just(0) | st.integers(-1, vocab_size + 1)),
            top_p=draw(st.just(1.0) | share()),
            min_p=draw(st.just(0.0) | share(0.0)),
            typical_p=draw(st.just(1.0) | share()),
            presence_penalty=draw(st.just(0.0) | st.floats(-2, 2)),
            frequency_penalty=draw(st.just(0.0) | st.floats(-2, 2)),
            repetition_penalty=draw(st.just(1.0) | st.floats(0, 10, exclude_min=True)),
            logit_bias=draw(
                st.just({}) | st.dictionaries(token_id, st.floats(-100, 100), max_size=4)
            ),
            allowed_token_ids=draw(st.none() | st.lists(token_id, min_size=1).map(tuple)),
            banned_token_ids=draw(st.just(()) | ids),
            min_tokens=draw(st.integers(0, 20)),
            logprobs=draw(st.none() | st.integers(0, vocab_size + 1)),
        )
    except RequestError:  # nothing is left that may be drawn
        assume(False)
    return SamplingRow(
        params=params,
        seed=draw(st.integers(0, MAX_SEED)),
        choice_index=draw(st.integers(0, 15)),
        token_ids=tokens,
        num_prompt_tokens=draw(st.integers(1, len(tokens))),
        end_token_ids=draw(ids),
        allowed_mask=draw(st.none() | st.none() | masks(vocab_size)),
    )


@st.composite
def masks(draw: st.DrawFn, vocab_size: int) -> MaskArray:
    """A grammar's: any set of ids, none and all among them."""
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    bits[:vocab_size] = rng.random(vocab_size) < draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    return np.packbits(bits, bitorder="little").view(np.uint32)


@st.composite
def batches(draw: st.DrawFn) -> tuple[np.ndarray, list[SamplingRow]]:
    vocab_size = draw(st.sampled_from([1, 2, 7, 10, 33]))
    rows = draw(st.lists(sampling_rows(vocab_size), min_size=1, max_size=4))
    row = st.lists(logit, min_size=vocab_size, max_size=vocab_size)
    broken_row = st.lists(broken_logit, min_size=vocab_size, max_size=vocab_size)
    values = [draw(st.one_of(row, row, row, broken_row)) for _ in rows]
    return np.array(values, dtype=np.float32), rows


@st.composite
def wide_batches(draw: st.DrawFn) -> tuple[np.ndarray, list[SamplingRow]]:
    """Rows of several chunks: bulks of any width, ties, a few likely ids, minus infinities."""
    vocab_size = draw(st.sampled_from([300, 511, 512, 513, 1024, 5_003, 32_000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = draw(st.lists(sampling_rows(vocab_size), min_size=1, max_size=3))
    logits = rng.normal(
        0, draw(st.sampled_from([0.0, 0.01, 1.0, 3.0, 30.0])), (len(rows), vocab_size)
    )
    if draw(st.booleans()):
        logits = np.round(logits * 4) / 4
    if draw(st.booleans()):
        likely = rng.choice(vocab_size, draw(st.integers(1, 40)), replace=False)
        logits[:, likely] += draw(st.sampled_from([1.0, 8.0, 20.0]))
    if draw(st.booleans()):
        logits[:, rng.random(vocab_size) < draw(st.sampled_from([0.1, 0.9, 1.0]))] = -np.inf
    if draw(st.booleans()):
        rows = [replace(row, params=replace(row.params, allowed_token_ids=None)) for row in rows]
    return logits.astype(np.float32), rows


def check_entry(found: TokenLogprobs | None, exact: TokenLogprobs | None) -> None:
    """The same ids, and log-probabilities that agree to 1e-9 or as far as doubles go."""
    if found is None or exact is None:
        assert found is exact
        return
    assert [token_id for token_id, _ in found.top] == [token_id for token_id, _ in exact.top]
    values = [found.logprob, *(value for _, value in found.top)]
    for value, wanted in zip(values, [exact.logprob, *(v for _, v in exact.top)], strict=True):
        close = math.isclose(value, wanted, rel_tol=1e-15, abs_tol=1e-9)
        assert close or (math.isnan(value) and math.isnan(wanted))
