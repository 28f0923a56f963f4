"""Penalties, bias and masks of a step's rows, applied on the device (docs/sampling.md, 1 and 2).

The host packs what a row's parameters say into the step's parcel: ids where there are few, words of
32 ids where a grammar or a list of allowed ids speaks of all. Rows without any are not touched.

Shapes: N rows with edits, P of them with penalties, M with a mask, V vocabulary, W = ceil(V / 32).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .protocol import MaskArray, SamplingRow
from .torch_histories import Histories, Place
from .torch_transfer import Parcel

__all__ = ["Edits", "RowEdits"]


class RowEdits:
    """What stays the same of one row's edits, kept from step to step."""

    __slots__ = ("_listed", "bias", "place")

    def __init__(self, row: SamplingRow, histories: Histories, vocab_size: int) -> None:
        params = row.params
        self.place: Place | None = histories.place() if params.has_penalties else None
        """Where the row's tokens are; None: no penalty looks at them."""
        self.bias = list(params.logit_bias.items())
        allowed = params.allowed_token_ids
        self._listed = None if allowed is None else _packed(allowed, vocab_size)

    def mask(self, row: SamplingRow) -> MaskArray | None:
        """[W] the only ids that may be drawn now; None: no such list."""
        if row.allowed_mask is None or self._listed is None:
            return self._listed if row.allowed_mask is None else row.allowed_mask
        return row.allowed_mask & self._listed

    @staticmethod
    def are_needed(row: SamplingRow) -> bool:
        """Whether a row may ever have some."""
        params = row.params
        return bool(
            params.has_penalties
            or params.logit_bias
            or params.allowed_token_ids is not None
            or params.banned_token_ids
            or row.allowed_mask is not None
            or (params.min_tokens and row.end_token_ids)
        )


class Edits:
    """The edits of the rows of one step that may have some."""

    def __init__(
        self, rows: Sequence[SamplingRow], edits: Sequence[RowEdits], positions: Sequence[int],
        histories: Histories, parcel: Parcel, vocab_size: int,
    ) -> None:  # fmt: skip
        """Put into the parcel what the device must know.

        `positions` are those of the tokens to be drawn.
        """
        self._vocab_size = vocab_size
        self._pack_penalties(rows, edits, histories, parcel)
        biases = [(n, *entry) for n, edit in enumerate(edits) for entry in edit.bias]
        self._num_biases = len(biases)
        if biases:
            places, ids, values = zip(*biases, strict=True)
            self._bias_places = parcel.add([places, ids])
            self._bias_values = parcel.add(values, np.float64)
        banned = [
            (n, token_id)
            for n, (row, position) in enumerate(zip(rows, positions, strict=True))
            for token_id in (*row.params.banned_token_ids, *_banned_ends(row, position))
        ]
        self._num_banned = len(banned)
        if banned:
            self._banned = parcel.add(list(zip(*banned, strict=True)))
        masks = [(n, edit.mask(row)) for n, (row, edit) in enumerate(zip(rows, edits, strict=True))]
        masked = [(n, mask) for n, mask in masks if mask is not None]
        self._num_masked = len(masked)
        if masked:
            self._masked = parcel.add([n for n, _ in masked])
            self._words = parcel.add(np.stack([mask for _, mask in masked]), np.uint32)

    def _pack_penalties(
        self, rows: Sequence[SamplingRow], edits: Sequence[RowEdits], histories: Histories,
        parcel: Parcel,
    ) -> None:  # fmt: skip
        penalized = [(n, edit.place) for n, edit in enumerate(edits) if edit.place is not None]
        self._num_penalized = len(penalized)
        if not penalized:
            return
        chosen = [rows[n] for n, _ in penalized]
        self._seen = histories.look_up(chosen, [place for _, place in penalized], parcel)
        self._penalized = parcel.add([n for n, _ in penalized])
        self._penalties = parcel.add(
            [
                (p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
                for p in (row.params for row in chosen)
            ],
            np.float64,
        )

    def apply(self, logits: Tensor) -> None:
        """Change `logits` [N, V], float32, in place; the parcel was sent."""
        if self._num_penalized:
            places = self._penalized.there
            logits[places] = self._penalize(logits[places])
        if self._num_biases:
            rows, ids = self._bias_places.there
            biased = logits[rows, ids].double() + self._bias_values.there
            logits[rows, ids] = biased.float()
        if self._num_masked:
            places = self._masked.there
            is_allowed = _unpacked(self._words.there, self._vocab_size)
            logits[places] = torch.where(is_allowed, logits[places], -torch.inf)
        if self._num_banned:
            rows, ids = self._banned.there
            logits.index_put_((rows, ids), logits.new_full(rows.shape, -torch.inf))

    def _penalize(self, logits: Tensor) -> Tensor:
        """[P, V]. A penalty that a row does not have changes no bit of it."""
        is_seen, counts = self._seen.count(self._vocab_size)
        repetition, presence, frequency = self._penalties.there.T[:, :, None]  # [P, 1] each
        values = logits.double()
        repeated = torch.where(values > 0, values / repetition, values * repetition)
        values = torch.where(is_seen, repeated.float(), logits).double()
        # In two operations: one that multiplies and adds may round once.
        penalties = frequency * counts
        penalties += presence
        return torch.where(counts > 0, (values - penalties).float(), values.float())


def _banned_ends(row: SamplingRow, position: int) -> tuple[int, ...]:
    """`SamplingRow.banned_token_ids` as it will be for the token at `position`."""
    num_generated = position - row.num_prompt_tokens
    return row.end_token_ids if num_generated < row.params.min_tokens else ()


def _packed(token_ids: Sequence[int], vocab_size: int) -> MaskArray:
    """A mask that allows those ids, [W]."""
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def _unpacked(words: Tensor, vocab_size: int) -> Tensor:
    """Words [M, W] of int32 → bool [M, V]."""
    bits = words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=words.device)
    return (bits & 1).bool().flatten(1)[:, :vocab_size]
