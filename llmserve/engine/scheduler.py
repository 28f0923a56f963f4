"""Which sequences advance in the next step, and by how many tokens.

One budget of tokens serves decodes and prefill together (Sarathi-Serve, Agrawal et al. 2024,
arXiv:2403.02310, section 4): every running sequence that decodes gets its one token first, what
is left goes to prefill in chunks, in order of service. So a long prompt delays nobody's next
token by more than one step of the budget's size.

A sequence gets all blocks of its known tokens when it is admitted, and one more whenever its
decoding fills the last. When the pool is empty the newest sequence is preempted: its blocks are
freed and it waits, with its tokens, to be computed again.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from .block_pool import BlockPool
from .config import EngineConfig
from .sequence import Sequence

__all__ = ["ScheduledSequence", "Scheduler"]


@dataclass(slots=True)
class ScheduledSequence:
    """A sequence's share of one step."""

    sequence: Sequence
    num_tokens: int
    """Tokens to compute, from `num_computed_tokens` on."""

    @property
    def needs_logits(self) -> bool:
        """Whether the step reaches the sequence's last token, so that the next can be drawn."""
        return self.num_tokens == self.sequence.num_pending_tokens


class Scheduler:
    """The waiting and running sequences, both in order of service, and the blocks they hold."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that holds no blocks. O(log waiting) comparisons."""
        insort(self.waiting, sequence, key=_sort_key)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that ended, and free its blocks."""
        queue = self.running if sequence.block_table else self.waiting
        queue.remove(sequence)
        self._release(sequence)

    def schedule(self, now: float) -> list[ScheduledSequence]:
        """Choose the next step's work and allocate its blocks."""
        scheduled, budget = self._schedule_decodes(self.config.max_batched_tokens)
        for sequence in self.running:
            if sequence.num_pending_tokens > 1 and budget:
                budget -= _take(scheduled, sequence, budget)
        while budget and self._can_admit():
            budget -= _take(scheduled, self._admit(now), budget)
        return scheduled

    def _schedule_decodes(self, budget: int) -> tuple[list[ScheduledSequence], int]:
        scheduled: list[ScheduledSequence] = []
        index = 0
        # The list shrinks from its end while the loop runs: preemption takes the newest.
        while index < len(self.running):
            sequence = self.running[index]
            index += 1
            if sequence.num_pending_tokens == 1 and self._make_room(sequence):
                budget -= _take(scheduled, sequence, budget)
        return scheduled, budget

    def _make_room(self, sequence: Sequence) -> bool:
        """Give a decoding sequence the block its token needs; False if it was preempted itself."""
        capacity = len(sequence.block_table) * self.config.block_size
        if sequence.num_computed_tokens < capacity:
            return True
        while not self.pool.num_free:
            newest = self.running[-1]
            self._preempt(newest)
            if newest is sequence:
                return False
        sequence.block_table += self.pool.allocate(1)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.num_preemptions += 1
        self.add(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.free(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed_tokens = 0

    def _can_admit(self) -> bool:
        if not self.waiting or len(self.running) >= self.config.max_num_seqs:
            return False
        # A block in hand for every running sequence: else admission would preempt at once.
        return self.pool.num_free >= self._num_blocks_of(self.waiting[0]) + len(self.running)

    def _admit(self, now: float) -> Sequence:
        sequence = self.waiting.pop(0)
        sequence.block_table = self.pool.allocate(self._num_blocks_of(sequence))
        if sequence.scheduled_time is None:
            sequence.scheduled_time = now
        insort(self.running, sequence, key=_sort_key)
        return sequence

    def _num_blocks_of(self, sequence: Sequence) -> int:
        return -(-len(sequence.token_ids) // self.config.block_size)

    def check(self) -> None:
        """Raise AssertionError if an invariant of queues and blocks is broken."""
        for queue in (self.waiting, self.running):
            keys = [sequence.sort_key for sequence in queue]
            assert keys == sorted(keys), "a queue is out of order"
        assert len(self.running) <= self.config.max_num_seqs, "too many sequences run"
        for sequence in self.waiting:
            assert not sequence.block_table, "a waiting sequence holds blocks"
            assert sequence.num_computed_tokens == 0, "a waiting sequence has computed tokens"
        for sequence in self.running:
            needed = self._num_blocks_of(sequence)
            held = len(sequence.block_table)
            # A token just drawn gets its block when it is scheduled.
            assert held in (needed, needed - 1), f"{held} blocks for {needed} blocks of tokens"
            assert sequence.num_computed_tokens <= held * self.config.block_size
        self.pool.check([sequence.block_table for sequence in self.running])


def _sort_key(sequence: Sequence) -> tuple[int, float, int]:
    return sequence.sort_key


def _take(scheduled: list[ScheduledSequence], sequence: Sequence, budget: int) -> int:
    num_tokens = min(sequence.num_pending_tokens, budget)
    scheduled.append(ScheduledSequence(sequence, num_tokens))
    return num_tokens
