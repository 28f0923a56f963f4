"""Any logits, any parameters: the C++ sampler draws what the specification says, on every path."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.runners.protocol import SamplingRow, TokenLogprobs
from llmserve.runners.sampler import prompt_logprobs, sample
from support.native_sampler import native_prompt_logprobs, native_sample
from support.sampling_oracle import oracle_token
from support.sampling_strategies import batches, sampling_rows

kernels = pytest.importorskip(
    "llmserve.native._kernels", reason="the C++ extension is not built in this environment"
)
pytestmark = pytest.mark.native

Logprobs = TokenLogprobs | None


@settings(max_examples=150, deadline=None)
@given(batches())
def test_every_row_gets_the_specified_token_alone_and_in_a_batch(
    batch: tuple[np.ndarray, list[SamplingRow]],
) -> None:
    logits, rows = batch
    wanted = [oracle_token(raw, row) for raw, row in zip(logits.tolist(), rows, strict=True)]
    for path in kernels.paths():
        result = native_sample(kernels, path, logits, rows)
        is_usable = [token_id is not None for token_id in wanted]
        assert (result.is_finite is None) == all(is_usable)
        assert result.is_finite is None or result.is_finite.tolist() == is_usable
        assert result.token_ids.tolist() == [token_id or 0 for token_id in wanted]
        for index, row in enumerate(rows):
            alone = native_sample(kernels, path, logits[index : index + 1], [row])
            assert alone.token_ids[0] == result.token_ids[index]
            if row.params.logprobs is not None:
                assert alone.logprobs is not None
                assert result.logprobs is not None
                assert alone.logprobs[0] == result.logprobs[index]


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


@settings(max_examples=150, deadline=None)
@given(wide_batches())
def test_wide_rows_get_what_the_numpy_sampler_gives(
    batch: tuple[np.ndarray, list[SamplingRow]],
) -> None:
    logits, rows = batch
    wanted = sample(logits, rows)
    results = [native_sample(kernels, path, logits, rows) for path in kernels.paths()]
    for result in results:
        assert result.token_ids.tolist() == wanted.token_ids.tolist()
        assert (result.is_finite is None) == (wanted.is_finite is None)
        if result.is_finite is not None and wanted.is_finite is not None:
            assert result.is_finite.tolist() == wanted.is_finite.tolist()
        assert result.logprobs == results[0].logprobs
        assert (result.logprobs is None) == (wanted.logprobs is None)
        for found, exact in zip(result.logprobs or [], wanted.logprobs or [], strict=True):
            check_entry(found, exact)


@settings(max_examples=60, deadline=None)
@given(batches(), st.integers(0, 40))
def test_prompt_logprobs_are_numpys_and_equal_on_every_path(
    batch: tuple[np.ndarray, list[SamplingRow]], num_top: int
) -> None:
    logits, _ = batch
    for target in range(logits.shape[1]):
        targets = [target] * len(logits)
        wanted = prompt_logprobs(logits, targets, num_top)
        results = [
            native_prompt_logprobs(kernels, path, logits, targets, num_top)
            for path in kernels.paths()
        ]
        for result in results:
            assert repr(result) == repr(results[0])  # NaN is not equal to itself
            for found, exact in zip(result, wanted, strict=True):
                check_entry(found, exact)


def check_entry(found: Logprobs, exact: Logprobs) -> None:
    """The same ids, and log-probabilities that agree to 1e-9 or as far as doubles go."""
    if found is None or exact is None:
        assert found is exact
        return
    assert [token_id for token_id, _ in found.top] == [token_id for token_id, _ in exact.top]
    values = [found.logprob, *(value for _, value in found.top)]
    for value, wanted in zip(values, [exact.logprob, *(v for _, v in exact.top)], strict=True):
        close = math.isclose(value, wanted, rel_tol=1e-15, abs_tol=1e-9)
        assert close or (math.isnan(value) and math.isnan(wanted))
