"""The learning rate over a run: a linear warm-up, then one of three shapes.

`cosine` falls by half a cosine to the final rate (arXiv:1608.03983, 5.1); `constant` stays; `wsd`
stays, then falls linearly to the final rate over the last part (warm-up, stable, decay:
arXiv:2404.06395, 4.2). During the warm-up no rate depends on the number of steps, so that a run
with a time budget can time its first steps before it decides how many there will be.
"""

from __future__ import annotations

import math
from typing import Literal

__all__ = ["learning_rate"]


def learning_rate(
    step: int,
    *,
    steps: int | None,
    warmup_steps: int,
    highest: float,
    final: float,
    schedule: Literal["cosine", "constant", "wsd"] = "cosine",
    decay_share: float = 0.2,
) -> float:
    """The rate of step `step`, counted from 0. `steps` may be None while they are not planned."""
    if step < warmup_steps:
        return highest * (step + 1) / warmup_steps
    if steps is None or schedule == "constant":
        return highest
    if schedule == "wsd":
        falling = max(1, round(steps * decay_share))
        progress = (step + 1 - (steps - falling)) / falling
        return highest + (final - highest) * min(1.0, max(0.0, progress))
    progress = (step - warmup_steps + 1) / max(1, steps - warmup_steps)
    return final + (highest - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
