"""A runner without a model, for tests and simulation: its tokens follow from the context alone.

It keeps a cache as every runner does. What it stores for a token is a digest of the token and of
what is stored for the one before it, as a model's keys and values depend on all that precedes
them. The next token is a digest of everything that it reads back through the block tables, of each
cache group what its window shows: a wrong slot, block table, release, context length or shared
block in the engine changes the answer, and nothing else does: not the batch, not chunking, not
preemption. `Context` computes the same from the plain list of ids. Nothing is cleared when blocks
change hands; slots never written hold -1.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ..config import ModelConfig
from ..errors import EngineError
from ..failpoints import hit
from .protocol import (
    Batch,
    CacheGroup,
    DoubleArray,
    HeadRows,
    HiddenSum,
    IntArray,
    PromptRows,
    RunnerInfo,
    SamplingRow,
    StepResult,
    TokenLogprobs,
)
from .rounds import repeat
from .sampler import unpack_mask

__all__ = ["Context", "FakeRunner", "next_token"]

Script = Callable[[SamplingRow], int | None]
"""Chooses a row's token; None leaves it to the digest."""

HIDDEN_SIZE = 3


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
        self._caches: list[IntArray] = []  # [slots] of each group
        self._block_size = 1
        self._result: StepResult | None = None

    @classmethod
    def for_config(
        cls,
        config: ModelConfig,
        *,
        step_s: float = 0.0,
        script: Script | None = None,
        adapters: tuple[str, ...] = (),
        fingerprint: str = "",
    ) -> FakeRunner:
        """A runner with the vocabulary, context and end ids of a model, and none of its weights."""
        windows = [config.window_of(index) for index in range(config.num_layers)]
        item = np.dtype(np.int64).itemsize
        info = RunnerInfo(
            vocab_size=config.vocab_size,
            max_seq_len=config.max_seq_len,
            eos_token_ids=config.eos_token_ids,
            cache_groups=tuple(
                CacheGroup(num_layers=windows.count(window), window=window, bytes_per_token=item)
                for window in sorted(set(windows), key=lambda window: (window is not None, window))
            ),
            runner="fake",
            executed_form="digest of the context",
            cache_dtype="int64",
            num_parameters=0,
            weight_bytes=0,
            fingerprint=fingerprint,
            hidden_size=HIDDEN_SIZE,
            adapters=adapters,
            head=None if config.head is None else config.head.kind,
            labels=() if config.head is None else config.head.labels,
        )
        return cls(info, step_s=step_s, script=script)

    def allocate_cache(self, num_blocks: tuple[int, ...], block_size: int) -> None:
        """Make the cache."""
        self._block_size = block_size
        self._caches = [np.full(count * block_size, -1, dtype=np.int64) for count in num_blocks]

    def cache_blocks(self) -> list[list[npt.NDArray[np.uint8]]]:
        """As in `CacheReader`; a group is one layer."""
        item = np.dtype(np.int64).itemsize
        return [
            [cache.view(np.uint8).reshape(-1, self._block_size * item)] for cache in self._caches
        ]

    def submit(self, batch: Batch) -> None:
        """Store the step's ids, and draw a token for every row of logits asked for."""
        hit("engine.forward")
        if self._step_s:
            time.sleep(self._step_s)
        self._result = repeat(self._compute, batch, self._block_size)

    def _compute(self, batch: Batch) -> StepResult:
        for cache, group in zip(self._caches, batch.groups, strict=True):
            blocks = cache.reshape(-1, self._block_size)
            blocks[group.block_copies[:, 1]] = blocks[group.block_copies[:, 0]]
        self._store(batch)
        rows = zip(batch.logits_indices.tolist(), batch.sampling, strict=True)
        tokens = [self._draw(batch, index, row) for index, row in rows]
        is_finite = np.array([token is not None for token in tokens], dtype=np.bool_)
        return StepResult(
            token_ids=np.array([token or 0 for token in tokens], dtype=np.int64),
            is_finite=None if is_finite.all() else is_finite,
            logprobs=[
                None
                if token is None or row.params.logprobs is None
                else self._logprobs(token, row.params.logprobs)
                for token, row in zip(tokens, batch.sampling, strict=True)
            ],
            prompt_logprobs=[self._prompt_logprobs(batch, rows) for rows in batch.prompt_rows],
            hidden_sums=[self._hidden_sum(batch, wanted) for wanted in batch.hidden_sums],
            head_scores=[self._head_scores(batch, rows) for rows in batch.head_rows],
        )

    def collect(self) -> StepResult:
        """The outcome of the last `submit`."""
        if self._result is None:
            raise EngineError("no step is under way: call submit first")
        result, self._result = self._result, None
        return result

    def close(self) -> None:
        """Drop the cache."""
        self._caches = []

    def _store(self, batch: Batch) -> None:
        """By ascending position: a token may follow one that another sequence computes now."""
        sequences = np.repeat(np.arange(len(batch.context_lens)), np.diff(batch.cu_seqlens))
        size = self._block_size
        for index in np.argsort(batch.positions, kind="stable").tolist():
            sequence, before = int(sequences[index]), int(batch.positions[index]) - 1
            for cache, group, kind in zip(
                self._caches, batch.groups, self.info.cache_groups, strict=True
            ):
                past = _adapter_of(batch, sequence)
                if before >= 0 and kind.window != 1:
                    block = int(group.block_tables[sequence, before // size])
                    past = int(cache[block * size + before % size])
                token_id = int(batch.token_ids[index])
                cache[group.slot_mapping[index]] = _stored(token_id, past)

    def _digest(self, batch: Batch, index: int) -> int:
        """Of what the packed token `index` attends to, itself included."""
        sequence = int(np.searchsorted(batch.cu_seqlens, index, side="right")) - 1
        position = int(batch.positions[index])
        digest = _adapter_of(batch, sequence)
        for cache, group, kind in zip(
            self._caches, batch.groups, self.info.cache_groups, strict=True
        ):
            first = 0 if kind.window is None else max(0, position - kind.window + 1)
            positions = np.arange(first, position + 1)
            blocks = group.block_tables[sequence][positions // self._block_size]
            context = cache[blocks * self._block_size + positions % self._block_size]
            digest = zlib.crc32(context.tobytes(), digest)
        return digest

    def _draw(self, batch: Batch, index: int, row: SamplingRow) -> int | None:
        token_id = self._script(row) if self._script is not None else None
        if token_id is not None:
            return token_id
        return _choose(self._digest(batch, index), row, self.info.vocab_size)

    def _prompt_logprobs(self, batch: Batch, rows: PromptRows) -> list[TokenLogprobs]:
        """Half the probability for each unit of the distance between target and digest."""
        vocab_size = self.info.vocab_size
        return [
            TokenLogprobs(
                float(np.log(0.5)) * (1 + (target - likeliest) % vocab_size),
                self._logprobs(likeliest, rows.num_top).top,
            )
            for index, target in enumerate(rows.targets, start=rows.start)
            for likeliest in [self._digest(batch, index) % vocab_size]
        ]

    def _hidden_sum(self, batch: Batch, wanted: HiddenSum) -> DoubleArray:
        """A token's state: three digits of its digest."""
        total = np.zeros(HIDDEN_SIZE) if wanted.carry is None else wanted.carry.copy()
        for index in range(wanted.start, wanted.stop):
            digest = self._digest(batch, index)
            total += [digest % 7, digest % 11, digest % 13]
        return total

    def _head_scores(self, batch: Batch, rows: HeadRows) -> list[list[float]]:
        """A token's score under a label: a digit of its digest."""
        digests = [self._digest(batch, index) for index in range(rows.start, rows.stop)]
        return [
            [float(digest >> 3 * place & 7) for place in range(len(self.info.labels))]
            for digest in digests
        ]

    def _logprobs(self, token_id: int, num_top: int) -> TokenLogprobs:
        """The token first, the ids after it below, each with half the probability of the last."""
        half, vocab_size = float(np.log(0.5)), self.info.vocab_size
        top = tuple(
            ((token_id + rank) % vocab_size, half * (rank + 1))
            for rank in range(min(num_top, vocab_size))
        )
        return TokenLogprobs(logprob=half, top=top)


class Context:
    """What the runner stores of one sequence and draws from it, without blocks: the oracle."""

    def __init__(
        self,
        token_ids: Sequence[int] = (),
        windows: Sequence[int | None] = (None,),
        *,
        adapter_id: int = 0,
    ) -> None:
        """`windows` are those of the cache groups, in their order."""
        self._windows = windows
        self._adapter_id = adapter_id
        self._stored: list[list[int]] = [[] for _ in windows]
        for token_id in token_ids:
            self.append(token_id)

    def append(self, token_id: int) -> None:
        """Go on by one token."""
        for stored, window in zip(self._stored, self._windows, strict=True):
            past = stored[-1] if stored and window != 1 else self._adapter_id
            stored.append(_stored(token_id, past))

    def digest(self) -> int:
        """What the next token follows from."""
        digest = self._adapter_id
        for stored, window in zip(self._stored, self._windows, strict=True):
            seen = stored if window is None else stored[-window:]
            digest = zlib.crc32(np.array(seen, dtype=np.int64).tobytes(), digest)
        return digest


def next_token(
    token_ids: Sequence[int], vocab_size: int, *windows: int | None, adapter_id: int = 0
) -> int:
    """The token that a greedy row follows `token_ids` with; no windows are one group without."""
    context = Context(token_ids, windows or (None,), adapter_id=adapter_id)
    return context.digest() % vocab_size


def _stored(token_id: int, past: int) -> int:
    return zlib.crc32(token_id.to_bytes(8, "little"), past)


def _adapter_of(batch: Batch, sequence: int) -> int:
    return 0 if batch.adapter_ids is None else int(batch.adapter_ids[sequence])


def _choose(digest: int, row: SamplingRow, vocab_size: int) -> int | None:
    """The digest's token; sampled rows mix their key in, masked ids give way to the next one.

    None where the masks leave no id.
    """
    params = row.params
    if not params.is_greedy:
        key = np.array([row.seed, row.choice_index, row.position], dtype=np.int64)
        digest = zlib.crc32(key.tobytes(), digest)
    banned = {*row.banned_token_ids, *params.banned_token_ids}
    allowed: Sequence[int] = range(vocab_size)
    if params.allowed_token_ids is not None:
        allowed = params.allowed_token_ids
    if row.allowed_mask is not None:
        banned |= set(np.flatnonzero(~unpack_mask(row.allowed_mask, vocab_size)).tolist())
    if not banned:
        return allowed[digest % len(allowed)]
    choices = [token_id for token_id in allowed if token_id not in banned]
    return choices[digest % len(choices)] if choices else None
