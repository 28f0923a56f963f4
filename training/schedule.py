"""The learning rate: a linear warm-up, then half a cosine down to a floor (arXiv:1608.03983, 5.1).

During the warm-up it does not depend on the number of steps, so that a run with a time budget can
time its first steps before it decides how many there will be.
"""

from __future__ import annotations

import math

__all__ = ["learning_rate"]


def learning_rate(
    step: int, *, steps: int | None, warmup_steps: int, highest: float, final: float
) -> float:
    """The rate of step `step`, counted from 0. `steps` may be None during the warm-up alone."""
    if step < warmup_steps:
        return highest * (step + 1) / warmup_steps
    if steps is None:
        return highest
    progress = (step - warmup_steps + 1) / max(1, steps - warmup_steps)
    return final + (highest - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
