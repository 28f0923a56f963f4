"""Whether an engine gets on: judged by its steps, in time that this process was awake for."""

from __future__ import annotations

__all__ = ["Progress"]

STALL_FACTOR = 10.0
"""An engine may be silent for this many times its slowest step, where that is longer."""


class Progress:
    """Steps of one engine, and the silence since the last."""

    def __init__(self, *, stall_s: float) -> None:
        """An engine with work that is silent for `stall_s` is stuck."""
        self._stall_s = stall_s
        self._slowest_step_s = 0.0
        self.silent_s = 0.0
        """Time with work to do and no step, as far as `tick` has seen it."""

    def step(self, step_s: float) -> None:
        """Note a step that took `step_s` seconds."""
        self._slowest_step_s = max(self._slowest_step_s, step_s)
        self.silent_s = 0.0

    def tick(self, elapsed_s: float, *, has_work: bool, most_s: float) -> None:
        """Note that time has passed; of a pause of this process no more than `most_s` counts.

        A machine that was suspended, or too busy to run either process, proves nothing.
        """
        self.silent_s = self.silent_s + min(elapsed_s, most_s) if has_work else 0.0

    @property
    def is_stuck(self) -> bool:
        """Whether it has been silent for longer than its steps can explain."""
        return self.silent_s > max(self._stall_s, STALL_FACTOR * self._slowest_step_s)
