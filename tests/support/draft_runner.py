"""A draft model's drafter over a scripted runner that watches its batches."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from llmserve.engine.block_keys import BlockKeys, root_key
from llmserve.engine.draft_model import DraftModelDrafter
from llmserve.engine.drafting import DraftRequest
from llmserve.runners.fake import FakeRunner, next_token
from llmserve.runners.protocol import Batch, RunnerInfo, SamplingRow, StepResult
from llmserve.sampling import SamplingParams
from support.engines import VOCAB, make_config, make_info, make_request

BLOCK_SIZE = 4
GREEDY = SamplingParams(temperature=0.0)


class WatchedRunner(FakeRunner):
    """Checks the form of every batch, keeps it, and gives no finite logits where told so."""

    def __init__(
        self, info: RunnerInfo, *, is_bad: Callable[[list[int]], bool] = lambda token_ids: False
    ) -> None:
        """`is_bad` says of a row's tokens whether its logits are not finite."""
        super().__init__(info)
        self.batches: list[Batch] = []
        self.rows: list[SamplingRow] = []
        """Rows drawn from, in order; their token lists go on changing."""
        self._is_bad = is_bad
        self._is_finite: list[bool] = []

    @property
    def num_tokens(self) -> list[int]:
        """Tokens of each batch."""
        return [batch.num_tokens for batch in self.batches]

    def submit(self, batch: Batch) -> None:
        """Check and keep the batch, then compute it."""
        check_batch(batch)
        self.batches.append(batch)
        self.rows += batch.sampling
        self._is_finite = [not self._is_bad(row.token_ids) for row in batch.sampling]
        super().submit(batch)

    def collect(self) -> StepResult:
        """The step's tokens, bad rows marked."""
        result = super().collect()
        result.is_finite = np.array(self._is_finite, dtype=np.bool_)
        return result


def check_batch(batch: Batch) -> None:
    """Raise AssertionError unless the arrays fit together as `Batch` says."""
    lengths = np.diff(batch.cu_seqlens)
    assert (lengths > 0).all(), "a sequence without tokens"
    assert batch.cu_seqlens[0] == 0
    assert batch.cu_seqlens[-1] == batch.num_tokens == len(batch.positions)
    assert sorted(lengths > 1) == list(lengths > 1), "one-token sequences come first"
    for start, stop, context_len in zip(
        batch.cu_seqlens[:-1], batch.cu_seqlens[1:], batch.context_lens, strict=True
    ):
        expected = range(int(context_len) - int(stop - start), int(context_len))
        assert batch.positions[start:stop].tolist() == list(expected)
    assert len(batch.logits_indices) == len(batch.sampling)
    for group in batch.groups:
        assert len(group.slot_mapping) == batch.num_tokens
        assert len(set(group.slot_mapping.tolist())) == batch.num_tokens, "a slot is written twice"
        assert len(group.block_tables) == len(lengths)
    for index, row in zip(batch.logits_indices.tolist(), batch.sampling, strict=True):
        assert row.position == batch.positions[index] + 1, "a row is drawn at a wrong position"


class Bench:
    """A drafter over a scripted runner."""

    def __init__(
        self,
        *,
        is_bad: Callable[[list[int]], bool] = lambda token_ids: False,
        max_batched_tokens: int = 64,
        **info: object,
    ) -> None:
        self.runner = WatchedRunner(make_info(**info), is_bad=is_bad)
        config = make_config(
            num_blocks=64,
            block_size=BLOCK_SIZE,
            max_batched_tokens=max_batched_tokens,
            max_num_seqs=4,
        )
        self.drafter = DraftModelDrafter(self.runner, make_info(), config)

    def propose(self, *sequences: Live, num_tokens: int = 3) -> list[list[int]]:
        """Guesses for each."""
        return self.drafter.propose([live.request(num_tokens) for live in sequences])


class Live:
    """A sequence of the target: its tokens and its block table."""

    def __init__(
        self,
        key: int,
        token_ids: list[int],
        table: list[int],
        *,
        params: SamplingParams = GREEDY,
        end_token_ids: tuple[int, ...] = (),
        salt: str | None = None,
    ) -> None:
        """`salt` is that of its block names; None: it has none."""
        self.key = key
        self.token_ids = token_ids
        self.table = table
        self.row = SamplingRow(
            params=params,
            seed=key,
            choice_index=0,
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            end_token_ids=end_token_ids,
        )
        request = make_request(str(key), list(token_ids), cache_salt=salt or "")
        keys = BlockKeys(root_key("model", request), request, token_ids, BLOCK_SIZE)
        self.block_keys = None if salt is None else keys

    def request(self, num_tokens: int) -> DraftRequest:
        """What the engine would ask."""
        num_blocks = -(-(len(self.token_ids) + num_tokens) // BLOCK_SIZE)
        assert num_blocks <= len(self.table), "the test gave the sequence too few blocks"
        return DraftRequest(
            key=self.key,
            row=self.row,
            num_tokens=num_tokens,
            block_tables=[self.table[:num_blocks]],
            block_keys=self.block_keys,
        )


def right(token_ids: list[int], count: int = 3) -> list[int]:
    """What the scripted model goes on with."""
    ids = list(token_ids)
    for _ in range(count):
        ids.append(next_token(ids, VOCAB))
    return ids[len(token_ids) :]


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random ids."""
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(length)]
