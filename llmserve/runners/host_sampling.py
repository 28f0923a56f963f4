"""Drawing tokens from logits in the host's memory: in C++ where it is built, else in numpy.

Both give the same tokens, to the bit (docs/sampling.md); C++ takes a tenth of the time for a row
that is drawn by chance, and no less where all rows just take their likeliest: numpy finds that in
one pass, and logits are seldom in this core's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ..native.kernels import choose_path, load_kernels
from .native_sampling import DrawnRows, are_plainly_greedy, pack_rows
from .protocol import IntArray, SamplingRow, StepResult
from .rounds import rows_after
from .sampler import likeliest, sample

__all__ = ["HostSampler"]


class HostSampler:
    """Draws for a runner whose logits are numpy arrays. Not for several threads."""

    def __init__(self) -> None:
        """Take the C++ sampler of this processor's best instruction set, if there is one."""
        self._kernels = cast(Any, load_kernels())
        self._path = None if self._kernels is None else choose_path()

    def sample(
        self,
        logits: npt.NDArray[np.float32],
        rows: list[SamplingRow],
        drawn: Sequence[IntArray] = (),
    ) -> StepResult:
        """One token for each row of `logits` [R, V]; the logits are left as they are. O(R V).

        `drawn`: the ids [R] of earlier rounds of the same step, which `rows` do not have yet; such
        rows ask for nothing that hangs on them but their place.
        """
        if are_plainly_greedy(rows):
            token_ids, is_finite = likeliest(logits)
            return StepResult(token_ids=token_ids, is_finite=None if is_finite.all() else is_finite)
        if self._kernels is None:
            return sample(logits, rows_after(rows, drawn) if drawn else rows)
        packed = pack_rows(rows, num_ahead=len(drawn))
        made = DrawnRows(packed, logits.shape[1])
        if packed.edits:  # which are made in place
            logits = logits.copy()
        out = made.logprobs
        self._kernels.sample(
            self._path, logits, packed.constants, packed.positions, packed.edits,
            made.token_ids, made.is_usable,
            out.logprobs, out.num_top, out.top_ids, out.top_logprobs,
        )  # fmt: skip
        return made.result()
