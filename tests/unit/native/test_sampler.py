"""The C++ sampler against the numpy one: every parameter, every path, and where bounds decide."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from llmserve.runners.native_sampling import DrawnRows, PackedRows, pack_rows
from llmserve.runners.philox import random_number
from llmserve.runners.protocol import SamplingRow
from llmserve.runners.sampler import prompt_logprobs, sample
from llmserve.runners.token_weights import steps_below, weights_at
from llmserve.sampling import SamplingParams
from support.native_sampler import native_prompt_logprobs, native_sample

kernels = pytest.importorskip(
    "llmserve.native._kernels", reason="the C++ extension is not built in this environment"
)
pytestmark = pytest.mark.native
every_path = pytest.mark.parametrize("path", kernels.paths())


def make_row(position: int = 9, *, prompt: int = 4, ids: int = 10, **changes: Any) -> SamplingRow:
    """A row whose next token is at `position`, after ids below `ids`."""
    ends = changes.pop("end_token_ids", ())
    return SamplingRow(
        params=SamplingParams(**changes),
        seed=1234567890123,
        choice_index=2,
        token_ids=[(7 * i * i) % ids for i in range(position)],
        num_prompt_tokens=prompt,
        end_token_ids=ends,
    )


def check(path: str, logits: np.ndarray, rows: list[SamplingRow]) -> None:
    """The path draws what the numpy sampler draws."""
    wanted, found = sample(logits, rows), native_sample(kernels, path, logits, rows)
    assert found.token_ids.tolist() == wanted.token_ids.tolist()
    assert (found.is_finite is None) == (wanted.is_finite is None)
    if found.is_finite is not None and wanted.is_finite is not None:
        assert found.is_finite.tolist() == wanted.is_finite.tolist()


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 100.0},
    {"temperature": 1e-9},
    {"temperature": 1e-320},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 3000},
    {"top_p": 0.9},
    {"top_p": 1e-12},
    {"top_p": 1 - 1e-12},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"typical_p": 0.5},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.02, "typical_p": 0.9},
    {"top_p": 0.95, "min_p": 0.02, "typical_p": 0.9, "temperature": 1.5},
    {"temperature": 0.0, "repetition_penalty": 1.7, "frequency_penalty": 1.5},
    {"presence_penalty": -2.0, "repetition_penalty": 0.3, "top_k": 5},
    {"temperature": 0.0, "logit_bias": {0: 90.0, 3: 100.0}, "banned_token_ids": (3,)},
    {"logit_bias": {5: -100.0}, "min_tokens": 90, "end_token_ids": (1, 2)},
    {"allowed_token_ids": (8, 3, 3, 1), "banned_token_ids": (3,)},
    {"temperature": 0.0, "allowed_token_ids": (4,), "min_tokens": 90, "end_token_ids": (4,)},
]


@every_path
@pytest.mark.parametrize("temperature", [1e-9, 0.01, 0.7, 1.0, 100.0])
def test_weights_are_the_specified_ones_to_the_unit(path: str, temperature: float) -> None:
    rng = np.random.default_rng(2)
    for spread, count in ((0.2, 70_001), (4.0, 1003), (1e30, 999)):
        logits = rng.normal(0, spread * temperature, count).astype(np.float32)
        logits[count // 2] = -np.inf
        largest = float(logits.max())
        wanted = steps_below(logits, largest, temperature)
        steps, weights = np.empty(count), np.empty(count, dtype=np.int64)
        scale = 512 / math.log(2) / max(temperature, 1e-9)
        kernels.weigh(path, logits, largest, scale, steps, weights)
        assert steps.tolist() == wanted.tolist()
        assert weights.tolist() == weights_at(wanted).tolist()


@every_path
@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 40.0])
@pytest.mark.parametrize("vocab_size", [10, 33, 511, 512, 513, 6000, 70_000])
def test_every_setting_draws_the_same_token(path: str, vocab_size: int, spread: float) -> None:
    rng = np.random.default_rng(vocab_size)
    rows = [make_row(position=9 + i, **settings) for i, settings in enumerate(SETTINGS)]
    logits = rng.normal(0, spread, (len(rows), vocab_size)).astype(np.float32)
    check(path, logits, rows)


@every_path
def test_a_vocabulary_of_one_id(path: str) -> None:
    rows = [make_row(ids=1, **settings) for settings in SETTINGS[:13]]
    check(path, np.full((13, 1), -3.0, dtype=np.float32), rows)


@every_path
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 511, 512, 700, 1030])
def test_a_row_that_is_not_finite_is_marked_and_its_neighbours_are_not(
    path: str, bad: float, place: int
) -> None:
    logits = np.random.default_rng(1).normal(0, 3, (4, 1031)).astype(np.float32)
    logits[1, place] = bad
    rows = [
        make_row(),
        make_row(banned_token_ids=(place,)),
        make_row(temperature=0.0),
        make_row(logprobs=2),
    ]
    found = native_sample(kernels, path, logits, rows)
    assert found.is_finite is not None
    assert found.is_finite.tolist() == [True, False, True, True]
    check(path, logits, rows)


@every_path
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_finite_logit_is_marked(path: str, temperature: float) -> None:
    logits = np.full((2, 600), -np.inf, dtype=np.float32)
    logits[1, 4] = 1e38  # and its edit overflows
    rows = [
        make_row(temperature=temperature),
        make_row(temperature=temperature, repetition_penalty=1e-3, ids=5),
    ]
    rows[1].token_ids.append(4)
    found = native_sample(kernels, path, logits, rows)
    assert found.is_finite is not None
    assert found.is_finite.tolist() == [False, False]
    check(path, logits, rows)


@every_path
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 3}, {"top_k": 900}], ids=str)
def test_ties_go_to_the_lowest_id(path: str, settings: dict[str, Any]) -> None:
    logits = np.zeros((8, 1200), dtype=np.float32)
    logits[1, ::2] = -0.0
    logits[2, 600:] = 1.0
    logits[3, [5, 517, 1029]] = 1.0
    logits[4, 1029] = 1.0
    logits[5:] = np.random.default_rng(0).integers(0, 3, (3, 1200))
    check(path, logits, [make_row(position=5 + i, **settings) for i in range(8)])


TAIL = 70_000
"""Ids whose bounded weights, each off by almost half a unit, are off by 30,000 together."""


def light_logit(fraction: float) -> float:
    """A logit beside 0 that weighs about 2^18 units before rounding, with that fraction of one."""
    value = np.float32(-24 * math.log(2))
    while abs(2.0 ** (42 + float(value) / math.log(2)) % 1.0 - fraction) > 0.02:
        value = np.nextafter(value, np.float32(0))
    return float(value)


@every_path
@pytest.mark.parametrize("fraction", [0.45, 0.55])
def test_a_draw_on_which_bounds_cannot_decide(path: str, fraction: float) -> None:
    """Random numbers that fall near the border between two light ids, behind a heavy one."""
    logits = np.full((1, 1 + TAIL), light_logit(fraction), dtype=np.float32)
    logits[0, 0] = 0.0
    row = make_row()
    late = 0
    for position in range(4, 30_000):
        if random_number(row.seed, row.choice_index, position) > (1 - TAIL / 2**24) * 2**53:
            late += 1
            check(path, logits, [make_row(position=position, ids=2)])
    assert late > 80


@every_path
@pytest.mark.parametrize("fraction", [0.45, 0.55])
def test_a_cut_on_which_bounds_cannot_decide(path: str, fraction: float) -> None:
    """Shares of a total in doubt that come within some thousand units of whole heavy ids."""
    logits = np.full((30, 10 + TAIL), light_logit(fraction), dtype=np.float32)
    logits[:, :10] = 0.0
    total = 10 * 2**42 + TAIL * round(2.0 ** (42 + float(logits[0, 10]) / math.log(2)))
    for count in (3, 9):
        for share in (count * 2**74 // total, count * 2**74 // total + 1):
            rows = [make_row(position=4 + i, top_p=share / 2**32, ids=2) for i in range(30)]
            check(path, logits, rows)


@every_path
@pytest.mark.parametrize("top_p", [0.1, 0.25, 0.5, 0.9])
def test_equal_ids_reach_a_share_exactly(path: str, top_p: float) -> None:
    for count in (10, 1000, 20_000):
        logits = np.full((20, count + 30), -np.inf, dtype=np.float32)
        logits[:, 30:] = 7.0
        check(path, logits, [make_row(position=4 + i, top_p=top_p) for i in range(20)])


@every_path
def test_extreme_logits(path: str) -> None:
    largest = float(np.finfo(np.float32).max)
    values = [-largest, -1e30, -1.0, -1e-45, 0.0, 1e-45, 1.0, 1e30, largest, -np.inf]
    rng = np.random.default_rng(7)
    logits = rng.choice(np.array(values, dtype=np.float32), (len(SETTINGS), 700))
    check(path, logits, [make_row(**settings) for settings in SETTINGS])


@every_path
def test_a_growing_sequence_is_counted_on(path: str) -> None:
    """What is kept with a row from step to step stays right: counts, and when end ids are free."""
    rng = np.random.default_rng(3)
    penalties: dict[str, Any] = {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
    }
    rows = [
        make_row(position=6, **penalties),
        make_row(position=6, repetition_penalty=1.3, temperature=0.0),
        make_row(position=6, min_tokens=8, end_token_ids=tuple(range(30)), temperature=0.0),
        make_row(position=6, frequency_penalty=2.0, logit_bias={1: 1.0}, banned_token_ids=(2,)),
    ]
    for _ in range(25):
        logits = rng.normal(0, 1, (4, 40)).astype(np.float32)
        logits[2, :30] += 5
        check(path, logits, rows)
        for row, token_id in zip(rows, sample(logits, rows).token_ids.tolist(), strict=True):
            row.token_ids.append(token_id)


@every_path
def test_logprobs_are_those_of_the_raw_logits(path: str) -> None:
    logits = np.random.default_rng(4).normal(0, 3, (5, 5000)).astype(np.float32)
    logits[3, 10:] = -np.inf
    logits[4, 0] = 60.0
    rows = [
        make_row(temperature=0.7, logit_bias={3: 50.0}, logprobs=4),
        make_row(logprobs=0),
        make_row(),
        make_row(logprobs=20, repetition_penalty=2.0, top_k=5),
        make_row(logprobs=6000, temperature=0.0),
    ]
    wanted, found = sample(logits, rows).logprobs, native_sample(kernels, path, logits, rows)
    assert wanted is not None
    assert found.logprobs is not None
    for entry, exact in zip(found.logprobs, wanted, strict=True):
        assert (entry is None) == (exact is None)
        if entry is not None and exact is not None:
            assert entry.logprob == pytest.approx(exact.logprob, abs=1e-9)
            assert [i for i, _ in entry.top] == [i for i, _ in exact.top]
            assert [v for _, v in entry.top] == pytest.approx([v for _, v in exact.top], abs=1e-9)
    first = native_sample(kernels, "portable", logits, rows)
    assert found.logprobs == first.logprobs


@every_path
def test_prompt_logprobs_of_an_unusable_row_are_nan_and_its_neighbours_are_not(path: str) -> None:
    logits = np.random.default_rng(8).normal(0, 3, (4, 600)).astype(np.float32)
    logits[0, 3], logits[1, 3], logits[2] = np.nan, np.inf, -np.inf
    *unusable, usable = native_prompt_logprobs(kernels, path, logits, [1] * 4, 2)
    assert all(math.isnan(entry.logprob) and entry.top == () for entry in unusable)
    (exact,) = prompt_logprobs(logits[3:], [1], 2)
    assert usable.logprob == pytest.approx(exact.logprob, abs=1e-9)


def call(packed: PackedRows, **changes: Any) -> None:
    """The binding with the buffers of `packed` over ten ids, some of them replaced."""
    drawn = DrawnRows(packed, 10)
    values: dict[str, Any] = {
        "path": "portable",
        "logits": np.zeros((len(packed.positions), 10), dtype=np.float32),
        "constants": packed.constants,
        "positions": packed.positions,
        "edits": packed.edits,
        "token_ids": drawn.token_ids,
        "is_usable": drawn.is_usable,
        "logprobs": drawn.logprobs.logprobs,
        "num_top": drawn.logprobs.num_top,
        "top_ids": drawn.logprobs.top_ids,
        "top_logprobs": drawn.logprobs.top_logprobs,
    }
    kernels.sample(*(values | changes).values())


def edits(*words: int) -> bytes:
    return np.array(words, dtype=np.int32).tobytes()


NARROW = np.zeros((1, 9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "sse9"}, "sse9"),
        ({"constants": bytes(79)}, "constants and positions"),
        ({"top_ids": NARROW.astype(np.int32), "top_logprobs": NARROW}, "more log-probabilities"),
        ({"token_ids": np.zeros(2, dtype=np.int64)}, "same number of rows"),
        ({"top_ids": np.zeros((1, 2), dtype=np.int32)}, "same number of rows"),
        ({"edits": edits(1, 0, -1, 0, 0, 0)}, "a row that is not there"),
        ({"edits": edits(0, 0, -1)}, "end early"),
        ({"edits": edits(0, 0, -1, 3, 0, 0, 1, 2)}, "end early"),
        ({"edits": edits(0, 0, -1, -3, 0, 0)}, "end early"),
        ({"edits": edits(0, 0, -1, 2, 0, 0, 1, 10)}, "vocabulary"),
        ({"edits": edits(0, 0, 2, 0, 0, 0, 4, 4)}, "ascend"),
    ],
    ids=str,
)
def test_buffers_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    packed = pack_rows([make_row(logprobs=10)])
    call(packed)
    with pytest.raises(ValueError, match=message):
        call(packed, **changes)
