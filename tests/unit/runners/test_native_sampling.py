"""What is packed for the C++ sampler, read back by its documented layout, and what comes back."""

from __future__ import annotations

import struct
from collections import Counter
from typing import Any

import numpy as np
import pytest

from llmserve.runners.native_sampling import DrawnRows, LogprobArrays, pack_rows
from llmserve.runners.protocol import SamplingRow, TokenLogprobs
from llmserve.sampling import MAX_SEED, SamplingParams


def make_row(token_ids: list[int], *, prompt: int = 1, **changes: Any) -> SamplingRow:
    ends = changes.pop("end_token_ids", ())
    return SamplingRow(
        params=SamplingParams(**changes),
        seed=MAX_SEED,
        choice_index=3,
        token_ids=token_ids,
        num_prompt_tokens=prompt,
        end_token_ids=ends,
    )


def read_edits(edits: bytes) -> dict[int, dict[str, Any]]:
    """Row → its lists, by the layout of sample_row.h."""
    found = {}
    place = 0

    def take(count: int, kind: str = "i") -> list[Any]:
        nonlocal place
        layout = f"={count}{kind}"
        values = list(struct.unpack_from(layout, edits, place))
        place += struct.calcsize(layout)
        return values

    while place < len(edits):
        assert place % 8 == 0
        row, num_bias, num_allowed, num_banned, num_seen, num_generated = take(6)
        bias = take(num_bias, "d")
        found[row] = {
            "bias": dict(zip(take(num_bias), bias, strict=True)),
            "allowed": take(num_allowed) if num_allowed >= 0 else None,
            "banned": take(num_banned),
            "seen": take(num_seen),
            "generated": dict(zip(take(num_generated), take(num_generated), strict=True)),
        }
        place += place % 8
    return found


def test_parameters_and_keys_of_a_row() -> None:
    params = {
        "temperature": 0.7,
        "top_p": 0.9,
        "min_p": 0.1,
        "typical_p": 0.8,
        "presence_penalty": -1.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.1,
    }
    packed = pack_rows([make_row([5]), make_row([5, 6], top_k=40, logprobs=7, **params)])
    record = struct.unpack("=7dQiiI4x", packed.constants[80:])
    assert record == (*params.values(), MAX_SEED, 40, 7, 3)
    assert packed.positions.tolist() == [1, 2]
    assert (packed.num_logprobs, packed.logprob_rows) == (7, [1])


def test_what_does_not_change_is_packed_once() -> None:
    row = make_row([5])
    pack_rows([row])
    state = row.runner_state
    row.token_ids.append(6)
    assert pack_rows([row]).positions.tolist() == [2]
    assert row.runner_state is state
    assert row == make_row([5, 6])


def test_a_row_without_edits_has_no_record() -> None:
    assert pack_rows([make_row([5]), make_row([5], top_k=3)]).edits == b""


def test_bias_and_masks() -> None:
    packed = pack_rows(
        [
            make_row([5], logit_bias={4: 1.5, 2: -100.0, 9: 0.25}),
            make_row([5]),
            make_row([5], allowed_token_ids=(8, 3, 8, 1), banned_token_ids=(3, 4)),
        ]
    )
    nothing: dict[str, Any] = {
        "bias": {},
        "allowed": None,
        "banned": [],
        "seen": [],
        "generated": {},
    }
    assert read_edits(packed.edits) == {
        0: nothing | {"bias": {4: 1.5, 2: -100.0, 9: 0.25}},
        2: nothing | {"allowed": [1, 3, 8], "banned": [3, 4]},
    }


def test_end_ids_are_banned_until_min_tokens_are_there() -> None:
    row = make_row([5, 5], prompt=2, min_tokens=2, end_token_ids=(7, 8))
    for length in (2, 3):
        assert len(row.token_ids) == length
        assert read_edits(pack_rows([row]).edits)[0]["banned"] == [7, 8]
        row.token_ids.append(5)
    assert pack_rows([row]).edits == b""


@pytest.mark.parametrize("penalties", [{"presence_penalty": 1.0}, {"frequency_penalty": -1.0}, {}])
def test_occurrences_are_counted_on_from_step_to_step(penalties: dict[str, float]) -> None:
    rng = np.random.default_rng(0)
    row = make_row([3, 1, 3], prompt=3, repetition_penalty=1.2, **penalties)
    for _ in range(20):
        (found,) = read_edits(pack_rows([row]).edits).values()
        assert sorted(found["seen"]) == sorted(set(row.token_ids))
        assert found["generated"] == (Counter(row.token_ids[3:]) if penalties else {})
        row.token_ids += rng.integers(0, 9, rng.integers(0, 3)).tolist()


def test_repetition_is_counted_only_where_it_is_penalized() -> None:
    (found,) = read_edits(pack_rows([make_row([3, 4, 4], presence_penalty=1.0)]).edits).values()
    assert (found["seen"], found["generated"]) == ([], {4: 2})


def test_drawn_rows_become_a_result() -> None:
    packed = pack_rows([make_row([5], logprobs=2), make_row([5]), make_row([5], logprobs=9)])
    drawn = DrawnRows(packed, vocab_size=4)
    assert drawn.logprobs.top_ids.shape == (3, 4)
    drawn.token_ids[:] = [1, 2, 0]
    drawn.is_usable[:] = [True, True, False]
    drawn.logprobs.logprobs[0] = -0.5
    drawn.logprobs.num_top[0] = 2
    drawn.logprobs.top_ids[0, :2] = [1, 3]
    drawn.logprobs.top_logprobs[0, :2] = [-0.5, -1.5]
    result = drawn.result()
    assert result.token_ids.tolist() == [1, 2, 0]
    assert result.is_finite is not None
    assert result.is_finite.tolist() == [True, True, False]
    entry = TokenLogprobs(logprob=-0.5, top=((1, -0.5), (3, -1.5)))
    assert result.logprobs == [entry, None, None]


def test_a_step_without_logprobs_and_faults_says_so_by_none() -> None:
    drawn = DrawnRows(pack_rows([make_row([5]), make_row([5])]), vocab_size=4)
    drawn.is_usable[:] = True
    result = drawn.result()
    assert result.logprobs is None
    assert result.is_finite is None


def test_entries_of_a_prompt() -> None:
    arrays = LogprobArrays(2, 3, 2)
    arrays.logprobs[:] = [-1.0, np.nan]
    arrays.num_top[:] = [1, 0]
    arrays.top_ids[0, 0], arrays.top_logprobs[0, 0] = 1, -0.25
    first, second = arrays.entries(range(2))
    assert first == TokenLogprobs(logprob=-1.0, top=((1, -0.25),))
    assert np.isnan(second.logprob)
    assert second.top == ()
