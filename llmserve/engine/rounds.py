"""How many tokens a step of decodes alone draws for each sequence: as many as take little time.

Choosing, packing and handing on a step costs the engine the same whatever the model is; beside a
small one that is a large share. With several rounds in one step it is paid once for all of them
("multi-step scheduling", https://blog.vllm.ai/2024/09/05/perf-update.html). What it costs is that
who arrives waits for the step's end, and that tokens come together: so the time is bounded.

A round takes what it took in the last step of as many sequences or more. Time is told, not read, so
that a recorded run decides alike when it is played again.
"""

from __future__ import annotations

from .config import EngineConfig
from .step import Step

__all__ = ["RoundClock"]


class RoundClock:
    """Tells how many rounds fit into the time that the configuration gives."""

    def __init__(self, config: EngineConfig) -> None:
        # A row of a block table gets one more block at most, for all rounds together.
        self._most = config.block_size
        self._most_s = config.most_rounds_s
        self._began = 0.0
        self._timed: tuple[int, int] | None = None
        """Sequences and rounds of the step that began then; None: it had something else in it."""
        self._known: tuple[int, float] | None = None
        """Sequences, and seconds of a round with them."""

    def tick(self, now: float) -> None:
        """A step begins at `now`, and so ended the one before."""
        if self._timed is not None:
            num_sequences, num_rounds = self._timed
            self._known = num_sequences, (now - self._began) / num_rounds
        self._began, self._timed = now, None

    def most(self, num_sequences: int) -> int:
        """Rounds that a step of `num_sequences` decodes may have. At least 1."""
        if self._known is None or num_sequences > self._known[0]:
            return 1
        round_s = self._known[1]
        if round_s * self._most <= self._most_s:
            return self._most
        return max(1, int(self._most_s / round_s))

    def note(self, step: Step) -> None:
        """This is the step that began."""
        if step.decodes and not step.chunks:
            self._timed = len(step.decodes), step.num_rounds
