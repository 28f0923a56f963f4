"""Which sequences advance in the next step, and by how many tokens.

One budget of tokens serves decodes and prefill together (Sarathi-Serve, Agrawal et al. 2024,
arXiv:2403.02310, section 4): every running sequence that decodes gets its one token first, what
is left goes to prefill in chunks, in order of service: a block's tokens at the least, and one for
each sequence that runs or waits, for else a large model's batch never fills. So a long prompt
delays nobody's next token by more than one step of the budget's size, or of twice as many tokens
as decode when the batch is full. Where nobody decodes the budget is larger: nobody's next token
waits. The further a chunk begins in its prompt, the more of the budget its tokens take: they attend
to more.

When the pool is empty the newest sequence is preempted: its blocks are freed, and it waits with
its tokens to be computed again, from whatever the prefix cache still has of them. The oldest is
never preempted, and every pool holds one sequence of full length: somebody always advances.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..runners.protocol import RunnerInfo
from .config import EngineConfig
from .kv_cache import KVCache, PrefixHit
from .policy import Policy
from .rounds import RoundClock
from .running import RunningTable
from .sequence import Sequence
from .speculator import Speculator
from .step import Chunk, Step

__all__ = ["PrefixStats", "Scheduler"]

DECODE_WEIGHT = 2.0
"""What a generated token costs a tenant beside one of a prompt (Sheng et al. 2024, section 4.1)."""


class PrefixStats:
    """Prefix-cache use by first admissions."""

    def __init__(self) -> None:
        self.num_tokens = self.num_hit_tokens = 0
        self.num_blocks = self.num_hit_blocks = 0

    def note(self, num_tokens: int, hit: PrefixHit, block_size: int) -> None:
        """Count one lookup of a prompt."""
        num_blocks = -(-num_tokens // block_size)
        self.num_tokens += num_tokens
        self.num_hit_tokens += min(hit.num_tokens, num_tokens)
        self.num_blocks += num_blocks
        self.num_hit_blocks += min(hit.num_blocks, num_blocks)


class Scheduler:
    """Waiting and running sequences, and the blocks they hold."""

    def __init__(
        self,
        config: EngineConfig,
        info: RunnerInfo,
        policy: Policy,
        speculator: Speculator | None = None,
    ) -> None:
        self.config = config
        self.policy = policy
        self.speculator = speculator
        self.kv = KVCache(config, info.cache_groups)
        self.running = RunningTable(config.max_num_seqs, policy.sort_key)
        self.prefix = PrefixStats()
        self.num_preemptions = 0
        self._rounds = RoundClock(config) if info.repeats_decodes and config.most_rounds_s else None
        last_chunk = config.max_batched_tokens / config.far_token_weight
        self._last_start = max(1.0, config.max_seq_len - last_chunk)
        self.num_waiting_tokens = 0
        """Known tokens of the waiting sequences."""
        self._adapter_ids = {name: index + 1 for index, name in enumerate(info.adapters)}
        self._tenants: dict[str, int] = {}

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that has no row."""
        self.policy.add(sequence)
        self.num_waiting_tokens += len(sequence.token_ids)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that ended, and free its blocks."""
        if sequence.row < 0:
            self._unqueue(sequence)
        else:
            self._release(sequence)

    def schedule(self, now: float) -> Step:
        """Choose the next step's work and allocate its blocks."""
        self.kv.begin_step()
        if self._rounds is not None:
            self._rounds.tick(now)
        step = Step()
        self._schedule_decodes(step)
        left = self._most_tokens(step) - len(step.decodes)
        budget = float(max(left, self._least_prefill()))
        spent = self._continue_prefill(step, budget)
        spent += self._admit(step, budget - spent, now)
        while step.is_empty and len(self.running) > 1:
            # Several prefills hold a windowed pool among them and none can go on.
            self._preempt(step, self.running.sequences[-1])
            spent += self._continue_prefill(step, budget)
        if self.speculator is not None:
            self.speculator.extend(step, self.kv, int(left - spent))
        if self._rounds is not None:
            self._repeat(step, self._rounds)
        if self.policy.charges:
            self._charge(step)
        step.chunks.sort(key=lambda chunk: chunk.num_tokens > 1)
        return step

    def _repeat(self, step: Step, rounds: RoundClock) -> None:
        """Let the decodes draw several tokens, if nothing else is to be done meanwhile.

        Nobody reads a prompt or waits who could be let in, nobody reaches its length on the way,
        and there are blocks for all. Who ends by a token is computed in vain from there on.
        """
        running = self.running
        is_alone = not step.chunks and (running.is_full or not len(self.policy))
        count = rounds.most(len(step.decodes)) if is_alone and self.speculator is None else 1
        if count > 1 and running.are_repeatable:
            rows, lengths = step.decode_rows, step.decode_lengths
            count = min(count, int((running.max_len[rows] - lengths).min()))
            if self.kv.extend(rows, lengths + (count - 1)):
                step.num_rounds = count
        rounds.note(step)

    def schedule_ahead(self, under_way: Step) -> Step | None:
        """The decodes that follow `under_way`, before it is known what that draws.

        Nothing else may be left to decide: nobody reads a prompt, nobody waits who could be let in,
        no grammar or penalty looks at the tokens, and no block is short. Who has drawn its last
        token by length is left out; who ends otherwise is computed once in vain.

        Returns:
            None where the result must be known first.
        """
        if under_way.chunks or self.speculator is not None:
            return None
        live = [n for n, one in enumerate(under_way.decodes) if one.finish_reason is None]
        if len(live) < len(self.running):
            return None
        if not all(under_way.decodes[n].is_foreseeable for n in live):
            return None
        rows = under_way.decode_rows[live]
        goes_on = self.running.num_computed[rows] + 2 < self.running.max_len[rows]
        if len(self.policy) and not (self.running.is_full and goes_on.all()):
            return None
        rows = rows[goes_on]
        lengths = self.running.num_computed[rows] + 2
        self.kv.release_windows(rows, lengths)
        if not len(rows) or not self.kv.extend(rows, lengths):
            return None
        places = np.array(live, dtype=np.int64)[goes_on]
        decodes = [under_way.decodes[n] for n in places.tolist()]
        step = Step(decodes=decodes, decode_rows=rows, decode_lengths=lengths, fed_rows=places)
        if self.policy.charges:
            self._charge(step)
        return step

    def seal_ahead(self, step: Step) -> None:
        """Offer the blocks that a step chosen ahead fills, now that its tokens are known."""
        for sequence in step.decodes:
            if sequence.finish_reason is None:
                length = int(self.running.num_computed[sequence.row]) + 1
                if length % self.config.block_size == 0:
                    self._seal(sequence, length)

    def _schedule_decodes(self, step: Step) -> None:
        kv, running = self.kv, self.running
        while True:
            rows = running.decode_rows
            lengths = running.num_computed[rows] + 1
            kv.release_windows(rows, lengths)
            # What decodes has blocks for all that is computed: only here is one full, or lacking.
            edges = (lengths % self.config.block_size < 2).nonzero()[0]
            if not len(edges) or kv.extend(rows[edges], lengths[edges]):
                break
            self._preempt(step, running.sequences[-1])
        step.decodes, step.decode_rows, step.decode_lengths = running.decoding, rows, lengths
        for index in edges.tolist():
            length = int(lengths[index])
            if length % self.config.block_size == 0:
                self._seal(step.decodes[index], length)

    def _continue_prefill(self, step: Step, budget: float) -> float:
        """Chunks for the running sequences that do not decode; what is spent of the budget."""
        spent = 0.0
        for sequence in self.running.prefilling:
            spent += self._take(step, sequence, budget - spent)
        return spent

    def _take(self, step: Step, sequence: Sequence, budget: float) -> float:
        """A chunk for what is left of the budget, smaller where blocks are short; what it takes."""
        row = sequence.row
        start = int(self.running.num_computed[row])
        weight = self._weight_at(start)
        num_tokens = self._affordable(step, budget / weight)
        one = np.array([row], dtype=np.int64)
        self.kv.release_windows(one, np.array([start + 1], dtype=np.int64))
        stop = min(len(sequence.token_ids), start + num_tokens, self.kv.most_tokens(row))
        if stop <= start:
            return 0.0
        self.kv.grow(row, stop)
        self._seal(sequence, stop)
        step.chunks.append(Chunk(sequence, start, stop))
        return weight * (stop - start)

    def _most_tokens(self, step: Step) -> int:
        config = self.config
        return config.max_batched_tokens if step.decodes else config.most_tokens

    def _least_prefill(self) -> int:
        """What prefill gets of a step whatever decodes take: with a token for each of a full batch
        the batch fills, as long as prompts are no longer than what is written after them."""
        return min(len(self.running) + len(self.policy), self.config.max_num_seqs)

    def _affordable(self, step: Step, num_tokens: float) -> int:
        """Tokens of a chunk; a step's first has a block's at least: else prompts would crawl while
        many decode, and batches never fill."""
        return max(int(num_tokens), 0 if step.chunks else self.config.block_size)

    def _weight_at(self, start: int) -> float:
        return 1.0 + (self.config.far_token_weight - 1.0) * min(1.0, start / self._last_start)

    def _admit(self, step: Step, budget: float, now: float) -> float:
        """Start what waits, while there is budget and room; what is spent."""
        spent = 0.0
        while self._affordable(step, budget - spent) and not self.running.is_full:
            sequence = self.policy.peek()
            if sequence is None:
                break
            hit = self.kv.find_prefix(sequence)
            # A block in hand for every running sequence: else admission would preempt at once.
            reserve = len(self.running)
            if hit.is_too_fresh:
                break
            if not self.kv.has_room(sequence, hit, reserve=reserve):
                if len(self.running):
                    break
                hit = PrefixHit()  # a pool of one sequence has no room for a copy beside a hit
            self._start(sequence, hit, now)
            spent += self._take(step, sequence, budget - spent)
        return spent

    def _start(self, sequence: Sequence, hit: PrefixHit, now: float) -> None:
        self._unqueue(sequence)
        request = sequence.request
        self.running.add(
            sequence,
            num_computed=hit.num_tokens,
            adapter_id=self._adapter_ids.get(request.adapter or "", 0),
            tenant_id=self._tenants.setdefault(request.tenant, len(self._tenants)),
        )
        self.kv.admit(sequence, hit)
        if sequence.scheduled_time is None:
            sequence.scheduled_time = now
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = hit.num_tokens
            # Once a request: its other choices find the prompt that the first has computed.
            is_first = sequence.choice_index == 0
            if self.config.has_prefix_cache and is_first and sequence.takes_hits:
                self.prefix.note(sequence.num_prompt_tokens, hit, self.config.block_size)

    def settle_rounds(self, sequence: Sequence) -> None:
        """Offer the blocks that a sequence has filled in several rounds."""
        self._seal(sequence, len(sequence.token_ids) - 1)

    def settle_drafts(self, chunk: Chunk, num_accepted: int) -> None:
        """Note which drafts were right; give back the others' blocks, and offer those now full."""
        assert self.speculator is not None, "there are drafts, but nobody who made them"
        sequence = chunk.sequence
        self.speculator.observe(chunk, num_accepted)
        self.kv.trim(sequence.row, len(sequence.token_ids))
        self._seal(sequence, len(sequence.token_ids) - 1)

    def _seal(self, sequence: Sequence, num_computed: int) -> None:
        if sequence.shares_blocks:
            self.kv.seal(sequence, num_computed)

    def _preempt(self, step: Step, sequence: Sequence) -> None:
        self._release(sequence)
        self.num_preemptions += 1
        step.preempted.append(sequence)
        self.add(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.kv.clear(sequence.row)
        self.running.remove(sequence)
        sequence.hidden_sum = None
        sequence.head_scores = []
        if self.speculator is not None:
            self.speculator.forget(sequence)

    def _unqueue(self, sequence: Sequence) -> None:
        self.policy.remove(sequence)
        self.num_waiting_tokens -= len(sequence.token_ids)

    def _charge(self, step: Step) -> None:
        used = np.zeros(len(self._tenants))
        weight = DECODE_WEIGHT * step.num_rounds
        np.add.at(used, self.running.tenant_id[step.decode_rows], weight)
        for chunk in step.chunks:
            used[self.running.tenant_id[chunk.sequence.row]] += chunk.num_tokens
        self.policy.charge(_nonzero(self._tenants, used.tolist()))

    def check(self) -> None:
        """Raise AssertionError if an invariant of queues and blocks is broken."""
        waiting = list(self.policy)
        keys = [self.policy.sort_key(sequence) for sequence in waiting]
        assert keys == sorted(set(keys)), "the queue is out of order, or holds a sequence twice"
        assert len(waiting) == len(self.policy)
        assert all(sequence.row < 0 for sequence in waiting), "a waiting sequence has a row"
        assert self.num_waiting_tokens == sum(len(sequence.token_ids) for sequence in waiting)
        self.running.check()
        computed = {
            sequence.row: int(self.running.num_computed[sequence.row])
            for sequence in self.running.sequences
        }
        self.kv.check(computed)


def _nonzero(names: Mapping[str, int], used: list[float]) -> dict[str, float]:
    return {name: used[index] for name, index in names.items() if used[index]}
