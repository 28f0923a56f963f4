"""Whether an engine gets on: judged by its steps, in time that this process was awake for.

A step of a large model may take long, and a process that is stopped or waits for ever uses no
processor. So silence counts in full only where the engine computes nothing.
"""

from __future__ import annotations

__all__ = ["Progress"]

STALL_FACTOR = 10.0
"""An engine may be silent for this many times its slowest step, where that is longer."""

COMPUTING_FACTOR = 12.0
"""Time in which the engine's process computed counts for so much less."""


FORGETTING = 0.99
"""What each other step leaves of the slowest: a pause of the machine within one is forgotten."""


class Progress:
    """Steps of one engine, and the silence since the last."""

    def __init__(self, *, stall_s: float, slowest_step_s: float = 0.0) -> None:
        """An engine with work that is silent for `stall_s` is stuck.

        `slowest_step_s` is known from engines before it.
        """
        self._stall_s = stall_s
        self.slowest_step_s = slowest_step_s
        """Of late."""
        self.silent_s = 0.0
        """Time with work to do and no step, as far as `tick` has seen it and it counts."""

    def step(self, step_s: float) -> None:
        """Note a step that took `step_s` seconds."""
        self.slowest_step_s = max(step_s, FORGETTING * self.slowest_step_s)
        self.silent_s = 0.0

    def tick(self, elapsed_s: float, *, has_work: bool, is_computing: bool, most_s: float) -> None:
        """Note that time has passed; of a pause of this process no more than `most_s` counts.

        A machine that was suspended, or too busy to run either process, proves nothing.
        """
        if not has_work:
            self.silent_s = 0.0
            return
        counted_s = min(elapsed_s, most_s)
        self.silent_s += counted_s / COMPUTING_FACTOR if is_computing else counted_s

    @property
    def is_stuck(self) -> bool:
        """Whether it has been silent for longer than its steps can explain."""
        return self.silent_s > max(self._stall_s, STALL_FACTOR * self.slowest_step_s)
