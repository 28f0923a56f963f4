"""The rows of a step that are drawn by chance, weighed and cut together on the device
(docs/sampling.md, 5 to 10).

The random numbers are made on the host, which knows seed, choice and position: ten rounds of Philox
over small arrays are less work than it would be to start their hundred operations elsewhere.

Shapes: R rows of a step, C of them drawn by chance, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..sampling import SamplingParams
from .philox import random_numbers
from .protocol import IntArray, SamplingRow
from .token_weights import WEIGHT_BITS, part, steps_per_unit, whole_share
from .torch_token_weights import (
    by_mass,
    by_rank,
    by_ratio,
    by_typicality,
    pick,
    steps_below,
    weights_at,
)
from .torch_transfer import Parcel, Sent

__all__ = ["Chance", "cut_numbers"]

_NO_CUT = -1

CutNumbers = tuple[int, int, int, int]


def cut_numbers(params: SamplingParams, vocab_size: int) -> CutNumbers:
    """The row's cuts as the device takes them: a count, a share, a weight, a share; -1: none."""
    return (
        params.top_k if 0 < params.top_k < vocab_size else _NO_CUT,
        whole_share(params.top_p) if params.top_p < 1.0 else _NO_CUT,
        part(params.min_p, 1 << WEIGHT_BITS) if params.min_p > 0.0 else _NO_CUT,
        whole_share(params.typical_p) if params.typical_p < 1.0 else _NO_CUT,
    )


@dataclass(frozen=True, slots=True)
class _Cut:
    """Rows with one kind of cut among those drawn by chance, and its number in each."""

    places: Sent | None  # [n]; None: all rows
    numbers: Sent  # [n, 1]
    most: int

    @classmethod
    def of(cls, numbers: IntArray, parcel: Parcel) -> _Cut | None:
        """From the rows' numbers, [C]; None: no row has the cut."""
        places = np.flatnonzero(numbers != _NO_CUT)
        if not len(places):
            return None
        sent = None if len(places) == len(numbers) else parcel.add(places)
        chosen = numbers[places]
        return cls(sent, parcel.add(chosen[:, None]), int(chosen.max()))

    def apply(self, make: Callable[..., Tensor], weights: Tensor, *beside: Tensor) -> Tensor:
        """`make(weights, *beside, numbers)` of the rows with the cut; the others stay."""
        if self.places is None:
            return make(weights, *beside, self.numbers.there)
        places = self.places.there
        kept = make(weights[places], *(each[places] for each in beside), self.numbers.there)
        return weights.index_copy_(0, places, kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chance:
    """The rows of one step that are not greedy."""

    places: Sent | None
    """[C] where they stand among the step's rows; None: all are."""
    random: Sent
    """[C, 1]"""
    steps_per_unit: Sent
    """[C, 1]"""
    top_k: _Cut | None
    top_p: _Cut | None
    min_p: _Cut | None
    typical_p: _Cut | None

    @classmethod
    def of(
        cls, rows: Sequence[SamplingRow], cuts: Sequence[CutNumbers], positions: IntArray,
        parcel: Parcel,
    ) -> Chance | None:  # fmt: skip
        """Put into the parcel what the device must know of `rows` [R]; None: all are greedy.

        `positions` [R] are those of the tokens to be drawn.
        """
        places = [n for n, row in enumerate(rows) if not row.params.is_greedy]
        if not places:
            return None
        chosen = [rows[n] for n in places]
        numbers = np.array([cuts[n] for n in places], dtype=np.int64).T  # [4, C]
        random = random_numbers(
            [row.seed for row in chosen],
            [row.choice_index for row in chosen],
            positions[places],
        )
        steps = [[steps_per_unit(row.params.temperature)] for row in chosen]
        top_k, top_p, min_p, typical_p = (_Cut.of(each, parcel) for each in numbers)
        return cls(
            places=None if len(places) == len(rows) else parcel.add(places),
            random=parcel.add(random[:, None]),
            steps_per_unit=parcel.add(steps, np.float64),
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            typical_p=typical_p,
        )

    def draw(self, logits: Tensor, token_ids: Tensor, powers: Tensor) -> None:
        """Write the ids drawn from `logits` [R, V] into `token_ids` [R].

        The parcel was sent. Rows that are not usable get an id that means nothing, V at most.
        """
        if self.places is not None:
            logits = logits[self.places.there]
        largest = logits.amax(1, keepdim=True)
        steps = steps_below(logits, largest, self.steps_per_unit.there)
        weights = weights_at(steps, powers)
        if self.top_k is not None:
            most = self.top_k.most
            weights = self.top_k.apply(lambda *arrays: by_rank(*arrays, most=most), weights, logits)
        if self.top_p is not None:
            weights = self.top_p.apply(by_mass, weights)
        if self.min_p is not None:
            weights = self.min_p.apply(by_ratio, weights)
        if self.typical_p is not None:
            weights = self.typical_p.apply(by_typicality, weights, steps)
        drawn = pick(weights, self.random.there)
        if self.places is None:
            token_ids.copy_(drawn)
        else:
            token_ids.index_copy_(0, self.places.there, drawn)
