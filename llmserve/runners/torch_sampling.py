"""From logits to tokens on the device: docs/sampling.md over many rows, in torch.

It draws what `sampler.py` draws, id for id, and only ids, flags and the log-probabilities asked for
come back. The host packs the rows' parameters, one copy takes them over, and no value that the
device computes decides what is computed next: nothing here waits for it.

Rows pay for what they ask: a greedy row for the largest of its logits alone.

Shapes: R rows, V vocabulary, K the most likeliest ids that a row asks for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .protocol import IntArray, SamplingRow, StepResult, TokenLogprobs
from .token_weights import MAX_VOCAB_SIZE
from .torch_chance import Chance, cut_numbers
from .torch_edits import Edits, RowEdits
from .torch_histories import Histories
from .torch_logprobs import entries, log_probabilities
from .torch_token_weights import powers_on
from .torch_transfer import Parcel, Sent

__all__ = ["DeviceSampler", "Drawn"]

_MOST_VALUES = 1 << 22
"""Logits that are weighed at once: at 8 bytes, and up to eight arrays of them, 256 MiB."""


class _RowState:
    """What follows from a row's parameters for as long as it lives."""

    __slots__ = ("cuts", "edits", "is_plain", "num_logprobs")

    def __init__(self, row: SamplingRow, histories: Histories, vocab_size: int) -> None:
        params = row.params
        self.edits = RowEdits(row, histories, vocab_size) if RowEdits.are_needed(row) else None
        self.num_logprobs = params.logprobs
        self.is_plain = self.edits is None and params.is_greedy and params.logprobs is None
        self.cuts = cut_numbers(params, vocab_size)


class DeviceSampler:
    """Samples the rows of one model's steps on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._powers = powers_on(device)
        self.histories = Histories(device)
        """Of the sequences with penalties."""

    def draw(self, logits: Tensor, rows: list[SamplingRow], positions: IntArray) -> Drawn:
        """Begin to draw one token for each row.

        Args:
            logits: Float32 [R, V]; they stay as they are.
            rows: What they say is read now; they may change afterwards.
            positions: [R] of the tokens to be drawn. Where no penalty looks back, a row need not
                know yet what comes before it.
        """
        assert logits.shape[1] <= MAX_VOCAB_SIZE
        most = max(1, _MOST_VALUES // logits.shape[1])
        pieces = [slice(start, start + most) for start in range(0, len(rows), most)]
        return Drawn([self._draw(logits[one], rows[one], positions[one]) for one in pieces])

    def _draw(self, logits: Tensor, rows: list[SamplingRow], positions: IntArray) -> _Part:
        vocab_size = logits.shape[1]
        states = [self._state_of(row, vocab_size) for row in rows]
        token_ids, is_usable = _largest(logits)
        if all(state.is_plain for state in states):
            return _Part(token_ids, is_usable)
        parcel = Parcel()
        edited = self._plan_edits(rows, states, positions, parcel, vocab_size)
        chance = Chance.of(rows, [state.cuts for state in states], positions, parcel)
        asking = [n for n, state in enumerate(states) if state.num_logprobs is not None]
        places = parcel.add(asking)
        parcel.send(self._device)
        values = logits
        if edited is not None:
            values = edited.apply(logits, token_ids, is_usable)
        if chance is not None:
            chance.draw(values, token_ids, self._powers)
        part = _Part(torch.where(is_usable, token_ids, 0), is_usable)
        if asking:
            part.num_top = {n: states[n].num_logprobs or 0 for n in asking}
            part.logprobs = log_probabilities(
                logits[places.there], part.token_ids[places.there], max(part.num_top.values())
            )
        return part

    def _plan_edits(
        self, rows: list[SamplingRow], states: list[_RowState], positions: IntArray,
        parcel: Parcel, vocab_size: int,
    ) -> _EditedRows | None:  # fmt: skip
        found = [(n, state.edits) for n, state in enumerate(states) if state.edits is not None]
        if not found:
            return None
        places, edits = [n for n, _ in found], [edit for _, edit in found]
        chosen, theirs = [rows[n] for n in places], positions[places].tolist()
        return _EditedRows(
            parcel.add(places),
            Edits(chosen, edits, theirs, self.histories, parcel, vocab_size),
        )

    def _state_of(self, row: SamplingRow, vocab_size: int) -> _RowState:
        if row.runner_state is None:
            row.runner_state = _RowState(row, self.histories, vocab_size)
        state: _RowState = row.runner_state
        return state


class _EditedRows:
    """The rows of a step with edits, and where they stand among all."""

    def __init__(self, places: Sent, edits: Edits) -> None:
        self._places, self._edits = places, edits

    def apply(self, logits: Tensor, token_ids: Tensor, is_usable: Tensor) -> Tensor:
        """The logits of all rows after the edits; ids and flags of those with edits are renewed."""
        places = self._places.there
        edited = logits[places]
        self._edits.apply(edited)
        token_ids[places], is_left = _largest(edited)
        is_usable[places] &= is_left
        return logits.index_copy(0, places, edited)


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit's id [R], ties to the lowest, 0 where it is not finite; and where it is."""
    token_ids = logits.argmax(1)  # a NaN counts as the largest
    is_usable = logits.gather(1, token_ids[:, None])[:, 0].isfinite()
    return torch.where(is_usable, token_ids, 0), is_usable


@dataclass(slots=True)
class _Part:
    """What was drawn for rows that were weighed at once."""

    token_ids: Tensor  # [R]
    is_usable: Tensor  # [R]
    num_top: dict[int, int] = field(default_factory=dict)
    """Rows that ask for log-probabilities, and for how many beside the drawn id's."""
    logprobs: list[Tensor] = field(default_factory=list)
    """Those, as `log_probabilities` gives them."""


class Drawn:
    """Tokens on the device."""

    def __init__(self, parts: list[_Part]) -> None:
        self._parts = parts

    def token_ids(self) -> Tensor:
        """[R]; 0 for a row that is not usable."""
        return torch.cat([part.token_ids for part in self._parts])

    def tensors(self) -> list[Tensor]:
        """What must come to the host."""
        return [
            tensor
            for part in self._parts
            for tensor in (part.token_ids, part.is_usable.long(), *part.logprobs)
        ]

    def result(self, arrays: Iterator[npt.NDArray[Any]]) -> StepResult:
        """What it says there; takes its own from `arrays`."""
        token_ids, is_usable = [], []
        logprobs: list[TokenLogprobs | None] = []
        for part in self._parts:
            token_ids.append(next(arrays))
            is_usable.append(next(arrays).astype(np.bool_))
            found: list[TokenLogprobs | None] = [None] * len(token_ids[-1])
            if part.num_top:
                made = entries(islice(arrays, 3), list(part.num_top.values()))
                for n, entry in zip(part.num_top, made, strict=True):
                    found[n] = entry if is_usable[-1][n] else None
            logprobs += found
        is_finite = np.concatenate(is_usable)
        return StepResult(
            token_ids=np.concatenate(token_ids),
            is_finite=None if is_finite.all() else is_finite,
            logprobs=logprobs if any(part.num_top for part in self._parts) else None,
        )
