"""Sampling on a device over the life of a row: what is kept there, and what the host waits for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmserve.runners import torch_sampling
from llmserve.runners.protocol import SamplingRow, StepResult
from llmserve.runners.sampler import sample
from llmserve.runners.torch_sampling import DeviceSampler
from llmserve.runners.torch_transfer import Download
from llmserve.sampling import SamplingParams
from support.no_waiting import never_waiting

VOCAB = 70
EVERYTHING: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.4, "logprobs": 0},
    {"temperature": 0.8, "frequency_penalty": 0.7, "presence_penalty": -0.3, "logprobs": 5},
    {"top_k": 9, "top_p": 0.8, "min_p": 0.05, "typical_p": 0.9},
    {"top_p": 0.5, "allowed_token_ids": tuple(range(0, VOCAB, 3)), "banned_token_ids": (6, 6)},
    {"typical_p": 0.6, "logit_bias": {4: 3.0, 69: -2.5}, "min_tokens": 40},
    {"temperature": 2.0},
]
"""Every parameter, and rows that have none of them."""


def make_rows(settings: list[dict[str, Any]]) -> list[SamplingRow]:
    rng = np.random.default_rng(len(settings))
    return [
        SamplingRow(
            params=SamplingParams(**changes),
            seed=index * 2**40,
            choice_index=index % 3,
            token_ids=rng.integers(0, VOCAB, 3 + 11 * index).tolist(),
            num_prompt_tokens=2 + 5 * index,
            end_token_ids=(1, 5),
        )
        for index, changes in enumerate(settings)
    ]


def logits_for(rows: list[SamplingRow], step: int) -> np.ndarray:
    logits = np.random.default_rng(step).normal(0, 2, (len(rows), VOCAB))
    return np.round(logits * 8).astype(np.float32) / 8


def draw(sampler: DeviceSampler, logits: np.ndarray, rows: list[SamplingRow]) -> StepResult:
    drawn = sampler.draw(torch.from_numpy(logits), rows, positions_of(rows))
    return drawn.result(iter(Download(drawn.tensors()).wait()))


def positions_of(rows: list[SamplingRow]) -> np.ndarray:
    return np.array([row.position for row in rows])


def make_sampler() -> DeviceSampler:
    return DeviceSampler(torch.device("cpu"))


def test_rows_that_grow_go_on_getting_numpys_tokens() -> None:
    """Far beyond the room that a history has at first; a row pauses, as one preempted does."""
    sampler, rows = make_sampler(), make_rows(EVERYTHING)
    for step in range(100):
        running = rows if step % 7 else rows[2:]
        logits = logits_for(running, step)
        wanted = sample(logits, running)
        found = draw(sampler, logits, running)
        assert found.token_ids.tolist() == wanted.token_ids.tolist()
        for row, token_id in zip(running, found.token_ids.tolist(), strict=True):
            row.token_ids += [token_id] * (1 + step % 4)


def test_more_rows_with_penalties_than_there_was_room_for() -> None:
    sampler, rows = make_sampler(), make_rows([EVERYTHING[2]] * 40)
    for step in range(3):
        logits = logits_for(rows, step)
        found = draw(sampler, logits, rows).token_ids.tolist()
        assert found == sample(logits, rows).token_ids.tolist()
        for row, token_id in zip(rows, found, strict=True):
            row.token_ids.append(token_id)


def test_a_history_is_sent_once_and_its_place_is_given_back() -> None:
    sampler = make_sampler()
    histories = sampler.histories
    for _ in range(50):  # places are used again: the table does not grow
        (row,) = make_rows([EVERYTHING[1]])
        draw(sampler, logits_for([row], 0), [row])
        place = row.runner_state.edits.place
        assert histories.token_ids[place.row, : place.num_held].tolist() == row.token_ids
        histories.token_ids[place.row, : place.num_held] = 3  # what is there is not sent again
        row.token_ids.append(7)
        draw(sampler, logits_for([row], 1), [row])
        held = histories.token_ids[place.row, : place.num_held].tolist()
        assert held == [3] * (len(row.token_ids) - 1) + [7]
    assert len(histories.token_ids) == 8


def test_rows_without_penalties_keep_no_history() -> None:
    sampler, rows = make_sampler(), make_rows([EVERYTHING[0], EVERYTHING[3], EVERYTHING[4]])
    draw(sampler, logits_for(rows, 0), rows)
    assert not sampler.histories.token_ids.any()


def test_masks_of_a_grammar_change_from_step_to_step() -> None:
    sampler, rows = make_sampler(), make_rows([{"temperature": 0.0}, EVERYTHING[4], {}])
    for step in range(20):
        rng = np.random.default_rng(step)
        for row in rows:
            row.allowed_mask = rng.integers(0, 2**32, 3, dtype=np.uint32)
        logits = logits_for(rows, step)
        wanted = sample(logits, rows)
        found = draw(sampler, logits, rows)
        assert found.token_ids.tolist() == wanted.token_ids.tolist()


def test_slices_of_a_large_batch_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(EVERYTHING)
    logits = logits_for(rows, 5)
    logits[1, 3], logits[4] = np.nan, -np.inf
    whole = draw(make_sampler(), logits, rows)
    monkeypatch.setattr(torch_sampling, "_MOST_VALUES", 2 * VOCAB)
    again = draw(make_sampler(), logits, make_rows(EVERYTHING))
    assert again.token_ids.tolist() == whole.token_ids.tolist()
    assert again.is_finite is not None
    assert whole.is_finite is not None
    assert again.is_finite.tolist() == whole.is_finite.tolist()
    assert again.logprobs == whole.logprobs


@pytest.mark.parametrize("settings", [EVERYTHING, EVERYTHING[:1], EVERYTHING[3:5]])
def test_the_host_waits_for_nothing(settings: list[dict[str, Any]]) -> None:
    sampler, rows = make_sampler(), make_rows(settings)
    logits = torch.from_numpy(logits_for(rows, 0))
    positions = positions_of(rows)
    with torch.inference_mode(), never_waiting():
        sampler.draw(logits, rows, positions)


@pytest.mark.parametrize(
    "read", [int, bool, Tensor.nonzero, lambda x: x.tolist(), lambda x: x.cpu(), lambda x: x[x > 0]]
)
def test_waiting_would_be_noticed(read: Callable[[Tensor], object]) -> None:
    with torch.inference_mode(), never_waiting(), pytest.raises(AssertionError, match="waits in"):
        read(torch.ones(1))
