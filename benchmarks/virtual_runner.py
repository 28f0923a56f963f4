"""A runner that computes nothing and takes the time that a cost model says, on a clock of its own.

The engine over it is the real one, so what a simulation finds about queues, chunks, the prefix
cache and preemption is what the engine does, not a model of it.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from llmserve.errors import EngineError
from llmserve.runners.protocol import Batch, CacheGroup, RunnerInfo, StepResult

__all__ = ["NUM_TOKEN_IDS", "StepLaw", "VirtualClock", "VirtualRunner"]

NUM_TOKEN_IDS = 2**31
"""Size of the vocabulary: each request of a simulation may have an id of its own."""


class StepLaw(Protocol):
    """What steps take."""

    def seconds(self, batch: Batch) -> float:
        """Of one step with all its rounds, asked once for each."""
        ...


class VirtualClock:
    """A time that goes on when it is told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass, at least 0."""
        self.now_s += seconds

    def advance_to(self, time_s: float) -> None:
        """Jump to a time that is not past."""
        self.now_s = time_s


class VirtualRunner:
    """Executes steps in no time. Implements `Runner`; synchronous.

    A sequence is followed by its last token again. Where each request has a prompt of one id of
    its own, no two have a block in common but by the names that its trace gives to blocks.
    """

    overlaps = False

    def __init__(
        self,
        cost: StepLaw,
        clock: VirtualClock,
        *,
        max_seq_len: int,
        repeats_decodes: bool = True,
    ) -> None:
        """Steps advance `clock` by what `cost` says; `repeats_decodes` as in `RunnerInfo`."""
        self.info = RunnerInfo(
            vocab_size=NUM_TOKEN_IDS,
            max_seq_len=max_seq_len,
            eos_token_ids=(),
            cache_groups=(CacheGroup(num_layers=1, window=None, bytes_per_token=1),),
            runner="virtual",
            executed_form="cost model",
            cache_dtype="none",
            num_parameters=0,
            weight_bytes=0,
            repeats_decodes=repeats_decodes,
        )
        self.busy_s = 0.0
        """Time spent in steps."""
        self.most_sequences = 0
        """Of one step."""
        self._cost = cost
        self._clock = clock
        self._result: StepResult | None = None

    def allocate_cache(self, num_blocks: tuple[int, ...], block_size: int) -> None:
        """Nothing is stored."""

    def submit(self, batch: Batch) -> None:
        """Let the step's time pass."""
        seconds = self._cost.seconds(batch)
        self.busy_s += seconds
        self._clock.advance(seconds)
        self.most_sequences = max(self.most_sequences, len(batch.context_lens))
        drawn = batch.token_ids[batch.logits_indices]
        self._result = StepResult(token_ids=np.tile(drawn, batch.num_rounds))

    def collect(self) -> StepResult:
        """The outcome of the last `submit`."""
        if self._result is None:
            raise EngineError("no step is under way: call submit first")
        result, self._result = self._result, None
        return result

    def close(self) -> None:
        """Nothing is held."""
