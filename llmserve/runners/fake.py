"""A runner without a model, for tests and simulation: its tokens follow from the context alone.

It keeps a cache as every runner does, but what it stores for a token is the token's id. The next
token is a digest of the ids it reads back through the block tables, so a wrong slot, block table
or context length in the engine changes the answer, and nothing else does: not the batch, not
chunking, not preemption. `next_token` computes the same from the plain list of ids.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from ..config import ModelConfig
from ..errors import EngineError
from ..failpoints import hit
from .protocol import (
    Batch,
    IntArray,
    RunnerInfo,
    SampledToken,
    SamplingRow,
    StepResult,
    TokenLogprobs,
)

__all__ = ["FakeRunner", "next_token"]

Script = Callable[[SamplingRow], int | None]
"""Chooses a row's token; None leaves it to the digest."""


class FakeRunner:
    """Executes steps by arithmetic on token ids. Implements `Runner`; synchronous."""

    overlaps = False

    def __init__(
        self, info: RunnerInfo, *, step_s: float = 0.0, script: Script | None = None
    ) -> None:
        """Describe itself as `info`; every step takes at least `step_s` seconds."""
        self.info = info
        self._step_s = step_s
        self._script = script
        self._cache: IntArray = np.empty((0, 0), dtype=np.int64)  # [blocks, block_size]
        self._result: StepResult | None = None

    @classmethod
    def for_config(
        cls, config: ModelConfig, *, step_s: float = 0.0, script: Script | None = None
    ) -> FakeRunner:
        """A runner with the vocabulary, context and end ids of a model, and none of its weights."""
        info = RunnerInfo(
            vocab_size=config.vocab_size,
            max_seq_len=config.max_seq_len,
            eos_token_ids=config.eos_token_ids,
            cache_bytes_per_token=np.dtype(np.int64).itemsize,
            runner="fake",
            executed_form="digest of the context",
            cache_dtype="int64",
            num_parameters=0,
            weight_bytes=0,
        )
        return cls(info, step_s=step_s, script=script)

    def allocate_cache(self, num_blocks: int, block_size: int) -> None:
        """Make the cache. Unwritten slots hold -1, which no token has."""
        self._cache = np.full((num_blocks, block_size), -1, dtype=np.int64)

    def submit(self, batch: Batch) -> None:
        """Store the step's ids, and draw a token for every row of logits asked for."""
        hit("engine.forward")
        if self._step_s:
            time.sleep(self._step_s)
        self._cache.reshape(-1)[batch.slot_mapping] = batch.token_ids
        rows = zip(batch.logits_indices, batch.sampling, strict=True)
        self._result = StepResult([self._draw(batch, int(index), row) for index, row in rows])

    def collect(self) -> StepResult:
        """The outcome of the last `submit`."""
        if self._result is None:
            raise EngineError("no step is under way: call submit first")
        result, self._result = self._result, None
        return result

    def close(self) -> None:
        """Drop the cache."""
        self._cache = np.empty((0, 0), dtype=np.int64)

    def _draw(self, batch: Batch, index: int, row: SamplingRow) -> SampledToken:
        sequence = int(np.searchsorted(batch.cu_seqlens, index, side="right")) - 1
        length = int(batch.context_lens[sequence])
        table = batch.block_tables[sequence, : -(-length // self._cache.shape[1])]
        context = self._cache[table].reshape(-1)[:length]
        token_id = self._script(row) if self._script is not None else None
        if token_id is None:
            token_id = _choose(context, row, self.info.vocab_size)
        return SampledToken(token_id, _logprobs(token_id, row, self.info.vocab_size))


def next_token(token_ids: Sequence[int], vocab_size: int) -> int:
    """The token that a greedy row follows `token_ids` with: the oracle of the engine's tests."""
    return zlib.crc32(np.array(token_ids, dtype=np.int64).tobytes()) % vocab_size


def _choose(context: IntArray, row: SamplingRow, vocab_size: int) -> int:
    """The digest's token; sampled rows mix their key in, banned ids give way to the next one."""
    digest = zlib.crc32(context.tobytes())
    if not row.params.is_greedy:
        key = np.array([row.seed, row.choice_index, row.position], dtype=np.int64)
        digest = zlib.crc32(key.tobytes(), digest)
    token_id = digest % vocab_size
    while token_id in row.banned_token_ids:
        token_id = (token_id + 1) % vocab_size
    return token_id


def _logprobs(token_id: int, row: SamplingRow, vocab_size: int) -> TokenLogprobs | None:
    """The token first, the ids after it below, each with half the probability of the last."""
    if row.params.logprobs is None:
        return None
    half = float(np.log(0.5))
    count = min(row.params.logprobs, vocab_size)
    top = tuple(((token_id + rank) % vocab_size, half * (rank + 1)) for rank in range(count))
    return TokenLogprobs(logprob=half, top=top)
