"""Guesses ahead of the model, put into a step: how many, by whom, and where their keys go.

A drafted sequence leaves the decodes of its step and becomes a chunk: its last token and the
guesses behind it, with a row of logits for each. The guesses only take budget, rows and blocks
that nobody else needs in that step.
"""

from __future__ import annotations

import numpy as np

from ..errors import ConfigError
from ..runners.protocol import Runner, RunnerInfo
from .config import EngineConfig
from .draft_model import DraftModelDrafter
from .drafting import Drafter, DraftRequest
from .kv_cache import KVCache
from .ngram import NgramDrafter
from .sequence import Sequence
from .speculation import SpeculationPolicy
from .step import Chunk, Step

__all__ = ["Speculator", "make_drafter", "make_speculator"]


class Speculator:
    """A drafter and the policy that says when it pays."""

    def __init__(self, drafter: Drafter, policy: SpeculationPolicy) -> None:
        self.drafter = drafter
        self.policy = policy

    def extend(self, step: Step, kv: KVCache, budget: int) -> None:
        """Turn decodes of `step` into chunks with guesses, `budget` of them at most in all."""
        if not step.decodes or budget < 1:
            return
        counts = self.policy.plan(
            [sequence.uid for sequence in step.decodes],
            sum(chunk.num_tokens for chunk in step.chunks),
        )
        requests, places = [], []
        for place, (sequence, count) in enumerate(zip(step.decodes, counts, strict=True)):
            # A grammar's mask is known for the next token alone.
            is_free = count and sequence.constraint is None
            room = self._make_room(sequence, min(count, budget), kv) if is_free else 0
            if room > 0:
                budget -= room
                places.append(place)
                requests.append(self._request(sequence, room, kv))
        if requests:
            self._add_guesses(step, places, self.drafter.propose(requests), kv)

    def observe(self, chunk: Chunk, num_accepted: int) -> None:
        """Note how many of a chunk's guesses were right."""
        self.policy.observe(chunk.sequence.uid, len(chunk.draft_ids), num_accepted)

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept for a sequence that ended or was preempted."""
        self.drafter.forget(sequence.uid)
        self.policy.forget(sequence.uid)

    def _make_room(self, sequence: Sequence, count: int, kv: KVCache) -> int:
        """Guesses that the sequence's end, the budget and the free blocks allow, with their blocks.

        The last token of a sequence is never guessed: nothing is drawn after it.
        """
        num_tokens = len(sequence.token_ids)
        room = min(
            count, sequence.max_len - num_tokens - 1, kv.most_tokens(sequence.row) - num_tokens
        )
        if room > 0:
            kv.grow(sequence.row, num_tokens + room)
        return room

    def _request(self, sequence: Sequence, num_tokens: int, kv: KVCache) -> DraftRequest:
        tables = (
            [group.held(sequence.row) for group in kv.groups] if self.drafter.reads_blocks else []
        )
        return DraftRequest(
            key=sequence.uid,
            row=sequence.sampling,
            num_tokens=num_tokens,
            block_tables=tables,
            block_keys=sequence.block_keys if sequence.shares_blocks else None,
        )

    def _add_guesses(
        self, step: Step, places: list[int], guesses: list[list[int]], kv: KVCache
    ) -> None:
        is_plain = np.ones(len(step.decodes), dtype=np.bool_)
        for place, draft_ids in zip(places, guesses, strict=True):
            sequence = step.decodes[place]
            num_tokens = len(sequence.token_ids)
            if draft_ids:
                is_plain[place] = False
                step.chunks.append(Chunk(sequence, num_tokens - 1, num_tokens, draft_ids))
            else:
                kv.trim(sequence.row, num_tokens)
        step.decode_rows = step.decode_rows[is_plain]
        step.decode_lengths = step.decode_lengths[is_plain]
        step.decodes = [step.decodes[place] for place in np.flatnonzero(is_plain).tolist()]


def make_drafter(
    info: RunnerInfo, config: EngineConfig, draft_runner: Runner | None = None
) -> Drafter | None:
    """Who guesses, as `config.speculation` says; None: nobody. A draft runner gets its cache.

    Raises:
        ConfigError: a draft model is missing, not asked for, or does not fit the target.
    """
    speculation = config.speculation
    wants_model = speculation is not None and speculation.method == "draft"
    if wants_model != (draft_runner is not None):
        raise ConfigError("a draft model and the speculation method 'draft' go together")
    if speculation is None:
        return None
    if draft_runner is None:
        return NgramDrafter(speculation)
    return DraftModelDrafter(draft_runner, info, config)


def make_speculator(config: EngineConfig, drafter: Drafter | None) -> Speculator | None:
    """Raises `ConfigError` unless a drafter is there exactly where speculation is asked for."""
    speculation = config.speculation
    if (speculation is None) != (drafter is None):
        raise ConfigError("speculation needs a drafter, and a drafter needs its settings")
    if speculation is None or drafter is None:
        return None
    return Speculator(drafter, SpeculationPolicy(speculation, config.step_cost, config.draft_cost))
