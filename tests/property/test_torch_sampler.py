"""Any logits, any parameters: the sampler in torch draws what the specification says."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.runners.protocol import SamplingRow, StepResult
from llmserve.runners.sampler import prompt_logprobs, sample
from llmserve.runners.torch_edits import Edits, RowEdits
from llmserve.runners.torch_histories import Histories
from llmserve.runners.torch_logprobs import entries, log_probabilities
from llmserve.runners.torch_sampling import DeviceSampler
from llmserve.runners.torch_transfer import Download, Parcel
from support.sampling_oracle import oracle_token, processed
from support.sampling_strategies import batches, check_entry, wide_batches

CPU = torch.device("cpu")

Batch = tuple[np.ndarray, list[SamplingRow]]


def torch_sample(logits: np.ndarray, rows: list[SamplingRow]) -> StepResult:
    for row in rows:
        row.runner_state = None  # of a sampler that is gone
    with torch.inference_mode():
        raw = torch.from_numpy(logits)
        before = raw.clone()
        positions = np.array([row.position for row in rows])
        drawn = DeviceSampler(CPU).draw(raw, rows, positions)
        result = drawn.result(iter(Download(drawn.tensors()).wait()))
        torch.testing.assert_close(raw, before, rtol=0, atol=0, equal_nan=True)
    return result


@settings(max_examples=150, deadline=None)
@given(batches())
def test_every_row_gets_the_specified_token_alone_and_in_a_batch(batch: Batch) -> None:
    logits, rows = batch
    wanted = [oracle_token(raw, row) for raw, row in zip(logits.tolist(), rows, strict=True)]
    result = torch_sample(logits, rows)
    is_usable = [token_id is not None for token_id in wanted]
    assert (result.is_finite is None) == all(is_usable)
    assert result.is_finite is None or result.is_finite.tolist() == is_usable
    assert result.token_ids.tolist() == [token_id or 0 for token_id in wanted]
    for index, row in enumerate(rows):
        alone = torch_sample(logits[index : index + 1], [row])
        assert alone.token_ids[0] == result.token_ids[index]


@settings(max_examples=120, deadline=None)
@given(st.one_of(batches(), wide_batches()))
def test_rows_get_what_the_numpy_sampler_gives(batch: Batch) -> None:
    logits, rows = batch
    wanted, found = sample(logits, rows), torch_sample(logits, rows)
    assert found.token_ids.tolist() == wanted.token_ids.tolist()
    assert (found.is_finite is None) == (wanted.is_finite is None)
    if found.is_finite is not None and wanted.is_finite is not None:
        assert found.is_finite.tolist() == wanted.is_finite.tolist()
    assert (found.logprobs is None) == (wanted.logprobs is None)
    for entry, exact in zip(found.logprobs or [], wanted.logprobs or [], strict=True):
        check_entry(entry, exact)


@settings(max_examples=150, deadline=None)
@given(batches())
def test_edited_logits_are_the_specified_ones_to_the_bit(batch: Batch) -> None:
    logits, rows = batch
    vocab_size, histories, parcel = logits.shape[1], Histories(CPU), Parcel()
    each = [RowEdits(row, histories, vocab_size) for row in rows]
    positions = [row.position for row in rows]
    edits = Edits(rows, each, positions, histories, parcel, vocab_size)
    parcel.send(CPU)
    found = torch.from_numpy(logits.copy())
    edits.apply(found)
    wanted = [processed(raw, row) for raw, row in zip(logits.tolist(), rows, strict=True)]
    np.testing.assert_array_equal(found.numpy(), np.array(wanted, dtype=np.float32))


@settings(max_examples=60, deadline=None)
@given(batches(), st.integers(0, 40))
def test_prompt_logprobs_are_numpys(batch: Batch, num_top: int) -> None:
    logits, _ = batch
    for target in range(logits.shape[1]):
        targets = [target] * len(logits)
        made = log_probabilities(torch.from_numpy(logits), torch.tensor(targets), num_top)
        found = entries(Download(made).wait(), [num_top] * len(logits))
        for entry, exact in zip(found, prompt_logprobs(logits, targets, num_top), strict=True):
            check_entry(entry, exact)
