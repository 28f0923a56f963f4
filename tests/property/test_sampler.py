"""Any logits, any parameters: the sampler draws what docs/sampling.md says, in any batch."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.runners.protocol import SamplingRow
from llmserve.runners.sampler import prompt_logprobs, sample
from support.sampling_oracle import oracle_logprobs, oracle_token
from support.sampling_strategies import batches


@settings(max_examples=150, deadline=None)
@given(batches())
def test_every_row_gets_the_specified_token_alone_and_in_a_batch(
    batch: tuple[np.ndarray, list[SamplingRow]],
) -> None:
    logits, rows = batch
    wanted = [oracle_token(raw, row) for raw, row in zip(logits.tolist(), rows, strict=True)]
    result = sample(logits, rows)
    is_finite = [token_id is not None for token_id in wanted]
    assert (result.is_finite is None) == all(is_finite)
    assert result.is_finite is None or result.is_finite.tolist() == is_finite
    assert result.token_ids.tolist() == [token_id or 0 for token_id in wanted]
    for index, row in enumerate(rows):
        alone = sample(logits[index : index + 1], [row])
        assert alone.token_ids[0] == result.token_ids[index]
        if row.params.logprobs is not None:
            assert alone.logprobs is not None
            assert result.logprobs is not None
            assert alone.logprobs[0] == result.logprobs[index]


@settings(max_examples=60, deadline=None)
@given(batches(), st.integers(0, 40))
def test_log_probabilities_are_those_of_the_raw_logits(
    batch: tuple[np.ndarray, list[SamplingRow]], num_top: int
) -> None:
    logits, _ = batch
    logits = logits[np.isfinite(logits.max(axis=1))]
    for target in range(logits.shape[1]):
        found = prompt_logprobs(logits, [target] * len(logits), num_top)
        for raw, entry in zip(logits.tolist(), found, strict=True):
            exact = [oracle_logprobs(raw, token_id) for token_id in range(len(raw))]
            # Beyond 2**20 the logits themselves are coarser than the absolute tolerance.
            assert math.isclose(entry.logprob, exact[target], rel_tol=1e-15, abs_tol=1e-9)
            ranked = sorted((-value, i) for i, value in enumerate(raw) if value > -math.inf)
            assert [token_id for token_id, _ in entry.top] == [i for _, i in ranked[:num_top]]
            for token_id, value in entry.top:
                assert math.isclose(value, exact[token_id], rel_tol=1e-15, abs_tol=1e-9)
