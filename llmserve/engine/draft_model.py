"""Guesses from a smaller model of the same vocabulary, run by a runner of its own.

A guess is drawn by the draft runner's own sampler with the sequence's parameters and the very
uniform number that the target will use at that position: where the two distributions are alike, so
are the draws. (The use of a draft model: Leviathan et al. 2023, arXiv:2211.17192.)

The draft's KV cache has as many blocks as the target's, and a sequence's keys and values lie in it
under the same block ids, so that one set of tables serves both. The draft reads only what it wrote:

- It begins a sequence with nothing computed and computes it in chunks through the sequence's own
  table. So nothing is missing after a prefix hit of the target, nor after its copy of a block
  (`block_copies` never come here): the draft fills the hit blocks and the copy itself.
- It counts no more tokens as computed than the target has, all but the last at most, and the blocks
  of these stay in the table until the sequence ends or is preempted and is forgotten. A block that
  held guesses alone may come back as another one: guesses count once they came true.
- Where the target shares a full block, the draft may write it again for each sequence that does:
  the same tokens at the same positions behind the same tokens, so the same values up to rounding,
  on which only guesses depend.

To compute a shared beginning for every sequence would waste what the prefix cache gains. So the
draft notes by block id the name (`BlockKeys`) of what it wrote there, and a sequence passes over
the blocks whose note is its own name. A note speaks of the draft's memory alone, whatever the
target did with the block meanwhile: it is made when the block is full of a sequence's real tokens,
and falls when the draft writes into the block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..errors import ConfigError
from ..runners.protocol import Batch, GroupTables, IntArray, Runner, RunnerInfo, SamplingRow
from ..sampling import SamplingParams
from .config import EngineConfig
from .drafting import DraftRequest

__all__ = ["DraftModelDrafter"]


@dataclass(slots=True, kw_only=True)
class _Draft:
    """What the draft has of one live sequence."""

    params: SamplingParams
    token_ids: list[int]
    """The sequence when last seen, then the guesses of that time."""
    num_known: int
    """How many of them were the sequence's own."""
    num_computed: int = 0
    """How many have their keys and values in the draft's cache."""
    num_noted: int = 0
    """Leading blocks with a note."""
    is_broken: bool = False
    """Whether the model gave no finite logits for it."""

    @property
    def num_pending(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def num_guesses(self) -> int:
        return len(self.token_ids) - self.num_known

    def update(self, token_ids: list[int]) -> None:
        """Take in the sequence as it is now; guesses stay computed as far as they came true."""
        true, end = self.num_known, min(len(self.token_ids), len(token_ids))
        while true < end and self.token_ids[true] == token_ids[true]:
            true += 1
        # The last token is always computed: the next one is drawn from its logits.
        self.num_computed = min(self.num_computed, true, len(token_ids) - 1)
        self.token_ids[true:] = token_ids[true:]
        self.num_known = len(token_ids)


@dataclass(slots=True, kw_only=True)
class _Turn:
    """One request on its way through `propose`."""

    request: DraftRequest
    draft: _Draft
    row: SamplingRow
    """How the draft draws: the request's row over the draft's own tokens, guesses included."""
    most_guesses: int
    stop: int = 0
    """Tokens that are computed once the batch under way is."""

    @property
    def is_drawn(self) -> bool:
        """Whether the batch under way reaches the last token, so that another is drawn."""
        return self.stop == len(self.draft.token_ids)

    @property
    def goes_on(self) -> bool:
        """Whether a guess was just drawn that wants another one."""
        draft = self.draft
        return (
            0 < draft.num_guesses < self.most_guesses
            and draft.num_pending == 1
            and draft.token_ids[-1] not in self.row.end_token_ids
        )


class DraftModelDrafter:
    """Implements `Drafter` by a model: a chunk to catch up, then one token after the other.

    A call computes at most `max_batched_tokens` of known tokens, the sequences that lack least
    first; one that is still behind gets no guesses yet. Neither does one longer than the draft's
    context, nor, until it is forgotten, one whose logits are not finite. Each guess after the first
    costs a step of the draft runner.
    """

    reads_blocks = True

    def __init__(self, runner: Runner, target: RunnerInfo, config: EngineConfig) -> None:
        """Allocate the draft's cache, as many blocks as the target's. The runner is not closed.

        Raises:
            ConfigError: the vocabularies differ, or one of the models has sliding windows.
        """
        _check_models(runner.info, target)
        self._runner = runner
        self._block_size = config.block_size
        self._max_batched_tokens = config.max_batched_tokens
        self._drafts: dict[int, _Draft] = {}
        self._notes: dict[int, bytes] = {}  # block id → name of what the draft wrote there
        runner.allocate_cache(config.num_blocks, config.block_size)

    def propose(self, requests: list[DraftRequest]) -> list[list[int]]:
        """What the draft model draws next, up to an id that ends the sequence."""
        turns = [self._begin(request) for request in requests]
        batch = self._choose_chunks(turns)
        while batch:
            self._compute(batch)
            batch = [turn for turn in batch if turn.goes_on]
            for turn in batch:
                turn.stop += 1
        return [turn.draft.token_ids[turn.draft.num_known :] for turn in turns]

    def forget(self, key: int) -> None:
        """Drop what is known of a sequence; the blocks that it filled stay noted."""
        self._drafts.pop(key, None)

    def check(self, keys: set[int]) -> None:
        """Raise AssertionError if something is kept of a sequence that is not among `keys`."""
        assert self._drafts.keys() <= keys, "a draft outlived its sequence"

    def _begin(self, request: DraftRequest) -> _Turn:
        row = request.row
        draft = self._drafts.get(request.key)
        if draft is None:
            params = replace(row.params, logprobs=None)
            draft = _Draft(params=params, token_ids=[*row.token_ids], num_known=len(row.token_ids))
            self._drafts[request.key] = draft
        draft.update(row.token_ids)
        self._pass_over(draft, request)
        room = self._runner.info.max_seq_len + 1 - draft.num_known
        return _Turn(
            request=request,
            draft=draft,
            row=replace(row, params=draft.params, token_ids=draft.token_ids),
            most_guesses=0 if draft.is_broken else min(request.num_tokens, room),
        )

    def _pass_over(self, draft: _Draft, request: DraftRequest) -> None:
        """Count the blocks as computed that were written for the same tokens before."""
        if request.block_keys is None or draft.num_pending < self._block_size:
            return
        names = request.block_keys.full(draft.num_known // self._block_size)
        table = request.block_tables[0]
        index = draft.num_computed // self._block_size
        while index < len(names) and self._notes.get(table[index]) == names[index]:
            index += 1
        passed = min(index * self._block_size, draft.num_known - 1)
        draft.num_computed = max(draft.num_computed, passed)

    def _choose_chunks(self, turns: list[_Turn]) -> list[_Turn]:
        """Who computes how many known tokens, those with one token first.

        Sequences that lack the same block do not write it side by side: the second one waits, and
        will find it noted.
        """
        budget = self._max_batched_tokens
        written: set[int] = set()
        batch = []
        for turn in sorted(turns, key=lambda turn: turn.draft.num_pending):
            start = turn.draft.num_computed
            turn.stop = start + min(turn.draft.num_pending, budget)
            blocks = self._blocks_to_write(turn)
            if turn.most_guesses > 0 and budget and written.isdisjoint(blocks):
                written.update(blocks)
                budget -= turn.stop - start
                batch.append(turn)
        batch.sort(key=lambda turn: turn.stop - turn.draft.num_computed > 1)
        return batch

    def _blocks_to_write(self, turn: _Turn) -> list[int]:
        first = turn.draft.num_computed // self._block_size
        return turn.request.block_tables[0][first : -(-turn.stop // self._block_size)]

    def _compute(self, batch: list[_Turn]) -> None:
        """Run the draft model up to every turn's `stop`, and take the tokens that it draws."""
        for turn in batch:
            for block_id in self._blocks_to_write(turn):
                self._notes.pop(block_id, None)
            first = turn.draft.num_computed // self._block_size
            turn.draft.num_noted = min(turn.draft.num_noted, first)
        self._runner.submit(_pack(batch, self._block_size))
        result = self._runner.collect()
        drawn = [turn for turn in batch if turn.is_drawn]
        for turn in batch:
            turn.draft.num_computed = turn.stop
            if not turn.draft.num_guesses:
                self._note(turn)
        is_finite = result.is_finite
        for index, (turn, token_id) in enumerate(
            zip(drawn, result.token_ids.tolist(), strict=True)
        ):
            if is_finite is None or is_finite[index]:
                turn.draft.token_ids.append(token_id)
            elif not turn.draft.num_guesses:
                self._break(turn)

    def _note(self, turn: _Turn) -> None:
        """Note the blocks that are full of the sequence's own tokens."""
        draft, keys = turn.draft, turn.request.block_keys
        count = draft.num_computed // self._block_size
        if keys is None or count <= draft.num_noted:
            return
        names = keys.full(count)
        for index in range(draft.num_noted, count):
            self._notes[turn.request.block_tables[0][index]] = names[index]
        draft.num_noted = count

    def _break(self, turn: _Turn) -> None:
        """Give up on a sequence, and trust none of its blocks: one of them may hold a NaN."""
        turn.draft.is_broken = True
        for block_id in turn.request.block_tables[0][: turn.draft.num_noted]:
            self._notes.pop(block_id, None)


def _check_models(draft: RunnerInfo, target: RunnerInfo) -> None:
    if draft.vocab_size != target.vocab_size:
        raise ConfigError(
            f"the draft model has {draft.vocab_size} token ids and the target {target.vocab_size}: "
            "take a draft model with the target's tokenizer"
        )
    for name, info in (("draft", draft), ("target", target)):
        if len(info.cache_groups) != 1 or info.cache_groups[0].window is not None:
            raise ConfigError(
                f"the {name} model has sliding windows, with which a draft model cannot be used: "
                "speculate by ngram instead"
            )


def _pack(batch: list[_Turn], block_size: int) -> Batch:
    """The batch that computes each turn's tokens up to its `stop`."""
    starts = np.array([turn.draft.num_computed for turn in batch], dtype=np.int64)
    stops = np.array([turn.stop for turn in batch], dtype=np.int64)
    offsets = np.concatenate(([0], np.cumsum(stops - starts)))  # [S + 1]
    sequences = np.repeat(np.arange(len(batch)), stops - starts)  # [T]
    positions = np.arange(offsets[-1]) - (offsets[:-1] - starts)[sequences]  # [T]
    tables = _tables(batch, -(-stops // block_size))
    blocks = tables[sequences, positions // block_size]
    token_ids: list[int] = []
    for turn in batch:
        token_ids += turn.draft.token_ids[turn.draft.num_computed : turn.stop]
    is_drawn = np.array([turn.is_drawn for turn in batch], dtype=np.bool_)
    return Batch(
        token_ids=np.array(token_ids, dtype=np.int64),
        positions=positions,
        cu_seqlens=offsets,
        context_lens=stops,
        groups=[
            GroupTables(
                slot_mapping=blocks * block_size + positions % block_size,
                block_tables=tables,
                block_copies=np.empty((0, 2), dtype=np.int64),
            )
        ],
        logits_indices=offsets[1:][is_drawn] - 1,
        sampling=[turn.row for turn in batch if turn.is_drawn],
    )


def _tables(batch: list[_Turn], num_blocks: IntArray) -> IntArray:
    tables = np.zeros((len(batch), int(num_blocks.max())), dtype=np.int64)
    for index, (turn, count) in enumerate(zip(batch, num_blocks.tolist(), strict=True)):
        tables[index, :count] = turn.request.block_tables[0][:count]
    return tables
