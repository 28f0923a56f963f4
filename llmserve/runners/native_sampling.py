"""Sampling rows as flat buffers for the C++ sampler, and its results as a `StepResult`.

Packing happens in every step, so what is constant for a sequence is packed once and kept with its
row; a plain row then costs its position. Both layouts are written down in
llmserve/native/csrc/sample_row.h, too.

Shapes: R rows, V vocabulary, K log-probabilities kept for each row.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from struct import Struct

import numpy as np
import numpy.typing as npt

from ..sampling import SamplingParams
from .protocol import (
    BoolArray,
    DoubleArray,
    IntArray,
    MaskArray,
    SamplingRow,
    StepResult,
    TokenLogprobs,
)

__all__ = ["DrawnRows", "LogprobArrays", "PackedRows", "are_plainly_greedy", "pack_rows"]

_NO_LOGPROBS = -1
_ALL_ALLOWED = -1
_CONSTANTS = Struct("=7dQiiI4x")
"""temperature, top_p, min_p, typical_p, the penalties (presence, frequency, repetition); seed;
top_k, log-probabilities; choice."""


@dataclass(frozen=True, slots=True)
class PackedRows:
    """The rows of one step."""

    constants: bytes
    """Parameters and keys, one record after another."""
    positions: array[int]
    """[R] int64, of the tokens to be drawn."""
    edits: bytes
    """Penalties, biases and masks of the rows that have some."""
    num_logprobs: int
    """The most log-probabilities that a row asks for beside the drawn token's; -1: none asks."""
    logprob_rows: list[int]
    """The rows that ask."""


def pack_rows(rows: list[SamplingRow], *, num_ahead: int = 0) -> PackedRows:
    """Pack the rows as they are now, or will be `num_ahead` tokens on. Keeps in each row's
    `runner_state` what does not change.

    O(R), and for a row with penalties, bias or masks O(its ids).
    """
    constants: list[bytes] = []
    positions = array("q")
    edits: list[bytes | array[int]] = []
    num_logprobs, logprob_rows = _NO_LOGPROBS, []
    for index, row in enumerate(rows):
        state = _state_of(row)
        constants.append(state.constants)
        positions.append(len(row.token_ids) + num_ahead)
        if state.is_plain:
            continue
        if state.edits is not None:
            edits += state.edits.packed(index, row)
        if state.num_logprobs != _NO_LOGPROBS:
            num_logprobs = max(num_logprobs, state.num_logprobs)
            logprob_rows.append(index)
    return PackedRows(b"".join(constants), positions, b"".join(edits), num_logprobs, logprob_rows)


def are_plainly_greedy(rows: list[SamplingRow]) -> bool:
    """Whether each row takes the likeliest token of its logits as they are, and no more of them.

    O(R). Keeps in each row's `runner_state` what does not change.
    """
    return all(_state_of(row).is_plainly_greedy for row in rows)


def _state_of(row: SamplingRow) -> _RowState:
    state: _RowState | None = row.runner_state
    if state is None:
        state = row.runner_state = _RowState(row)
    return state


class LogprobArrays:
    """Where the C++ sampler writes log-probabilities."""

    def __init__(self, num_rows: int, num_top: int, vocab_size: int) -> None:
        """Room for the given ids of `num_rows` rows, and the `num_top` largest logits of each."""
        width = min(num_top, vocab_size)
        self.logprobs: DoubleArray = np.empty(num_rows, dtype=np.float64)
        self.num_top: npt.NDArray[np.int32] = np.empty(num_rows, dtype=np.int32)
        self.top_ids: npt.NDArray[np.int32] = np.empty((num_rows, width), dtype=np.int32)
        self.top_logprobs: DoubleArray = np.empty((num_rows, width), dtype=np.float64)

    def entries(self, rows: Iterable[int]) -> list[TokenLogprobs]:
        """What was written for those rows."""
        return [self._entry(row) for row in rows]

    def _entry(self, row: int) -> TokenLogprobs:
        count = int(self.num_top[row])
        ids: list[int] = self.top_ids[row, :count].tolist()
        values: list[float] = self.top_logprobs[row, :count].tolist()
        return TokenLogprobs(
            logprob=float(self.logprobs[row]), top=tuple(zip(ids, values, strict=True))
        )


class DrawnRows:
    """Where the C++ sampler writes what it drew in one step."""

    def __init__(self, packed: PackedRows, vocab_size: int, num_rounds: int = 1) -> None:
        """Room for the rows of `packed`, with the log-probabilities that they ask for: of
        `num_rounds` rounds only where they ask for none."""
        num_rows = len(packed.positions)
        self.token_ids: IntArray = np.empty(num_rows * num_rounds, dtype=np.int64)
        self.is_usable: BoolArray = np.empty(num_rows * num_rounds, dtype=np.bool_)
        self.logprobs = LogprobArrays(num_rows, max(packed.num_logprobs, 0), vocab_size)
        self._logprob_rows = packed.logprob_rows

    def keep(self, count: int) -> None:
        """Forget all but the first `count` ids: no more were drawn."""
        self.token_ids, self.is_usable = self.token_ids[:count], self.is_usable[:count]

    def result(self) -> StepResult:
        """What was written, as the engine takes it."""
        is_usable = None if self.is_usable.all() else self.is_usable
        logprobs: list[TokenLogprobs | None] | None = None
        if self._logprob_rows:
            logprobs = [None] * len(self.token_ids)
            for row in self._logprob_rows:
                if self.is_usable[row]:
                    (logprobs[row],) = self.logprobs.entries([row])
        return StepResult(token_ids=self.token_ids, is_finite=is_usable, logprobs=logprobs)


class _RowState:
    """What is kept with a row from step to step."""

    __slots__ = ("constants", "edits", "is_plain", "is_plainly_greedy", "num_logprobs")

    def __init__(self, row: SamplingRow) -> None:
        params = row.params
        self.num_logprobs = _NO_LOGPROBS if params.logprobs is None else params.logprobs
        self.constants = _CONSTANTS.pack(
            params.temperature,
            params.top_p,
            params.min_p,
            params.typical_p,
            params.presence_penalty,
            params.frequency_penalty,
            params.repetition_penalty,
            row.seed,
            params.top_k,
            self.num_logprobs,
            row.choice_index,
        )
        self.edits = _RowEdits(row) if _has_edits(row) else None
        self.is_plain = self.edits is None and params.logprobs is None
        self.is_plainly_greedy = self.is_plain and params.is_greedy


def _has_edits(row: SamplingRow) -> bool:
    params = row.params
    return bool(
        params.logit_bias
        or params.allowed_token_ids is not None
        or params.banned_token_ids
        or row.allowed_mask is not None
        or (params.min_tokens and row.end_token_ids)
        or _has_count_penalties(params)
        or params.repetition_penalty != 1.0
    )


def _has_count_penalties(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty)


class _RowEdits:
    """Penalties, bias and masks of one sequence, packed as far as they do not change."""

    __slots__ = ("_banned", "_bias", "_generated", "_listed", "_num_allowed", "_num_bias", "_seen")

    def __init__(self, row: SamplingRow) -> None:
        params = row.params
        bias = params.logit_bias
        self._num_bias = len(bias)
        self._bias = array("d", bias.values()).tobytes() + array("i", bias).tobytes()
        allowed = params.allowed_token_ids
        self._num_allowed = _ALL_ALLOWED if allowed is None else len(set(allowed))
        self._listed = array("i", sorted(set(allowed or ())))
        self._banned = array("i", params.banned_token_ids)
        self._seen = _Occurrences(0) if params.repetition_penalty != 1.0 else _NO_OCCURRENCES
        self._generated = (
            _Occurrences(row.num_prompt_tokens) if _has_count_penalties(params) else _NO_OCCURRENCES
        )

    def packed(self, index: int, row: SamplingRow) -> list[bytes | array[int]]:
        """The parts of the row's record in this step; none if it has nothing to edit in it."""
        banned = self._banned + array("i", row.banned_token_ids)
        seen, generated = self._seen, self._generated
        seen.count(row.token_ids)
        generated.count(row.token_ids)
        listed, num_allowed = self._listed, self._num_allowed
        if row.allowed_mask is not None:
            listed = _allowed_ids(row.allowed_mask, None if num_allowed < 0 else listed)
            num_allowed = len(listed)
        counts = (self._num_bias, num_allowed, len(banned), len(seen.ids), len(generated.ids))
        if counts == _NOTHING:
            return []
        num_ids = self._num_bias + len(listed) + len(banned) + len(seen.ids)
        return [
            array("i", (index, *counts)),
            self._bias,
            listed,
            banned,
            seen.ids,
            generated.ids,
            generated.counts,
            _PADDING[: num_ids % 2],
        ]


def _allowed_ids(mask: MaskArray, listed: array[int] | None) -> array[int]:
    """The ids that a mask allows, of those listed where some are. O(V), V / 8 bytes read."""
    bits = np.unpackbits(mask.astype("<u4", copy=False).view(np.uint8), bitorder="little")
    allowed = bits.view(np.bool_)
    if listed is not None:
        is_listed = np.zeros_like(allowed)
        is_listed[np.frombuffer(listed, dtype=np.int32)] = True
        allowed = allowed & is_listed
    ids = array("i")
    ids.frombytes(allowed.nonzero()[0].astype(np.int32).tobytes())
    return ids


class _Occurrences:
    """The distinct ids of a sequence from some position on, and how often each occurs."""

    __slots__ = ("_num_counted", "_places", "counts", "ids")

    def __init__(self, start: int) -> None:
        self.ids = array("i")
        self.counts = array("i")
        self._places: dict[int, int] = {}
        self._num_counted = start

    def count(self, token_ids: list[int]) -> None:
        """Take in what was appended since the last call. O(that)."""
        for token_id, number in Counter(token_ids[self._num_counted :]).items():
            place = self._places.setdefault(token_id, len(self.ids))
            if place == len(self.ids):
                self.ids.append(token_id)
                self.counts.append(number)
            else:
                self.counts[place] += number
        self._num_counted = len(token_ids)


class _NoOccurrences(_Occurrences):
    """For a row without the penalty: nothing is counted."""

    __slots__ = ()

    def count(self, token_ids: list[int]) -> None:
        pass


_NO_OCCURRENCES = _NoOccurrences(0)
_NOTHING = (0, _ALL_ALLOWED, 0, 0, 0)
_PADDING = array("i", [0])
