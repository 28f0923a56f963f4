"""Any logits, any parameters: the C++ sampler draws what the specification says, on every path."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.runners.protocol import SamplingRow, TokenLogprobs
from llmserve.runners.sampler import prompt_logprobs, sample
from support.native_sampler import native_prompt_logprobs, native_sample
from support.sampling_oracle import oracle_token
from support.sampling_strategies import batches, check_entry, wide_batches

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
