"""The C++ sampler called alone, on one instruction set, with the numpy sampler's interface."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from llmserve.runners.native_sampling import DrawnRows, LogprobArrays, pack_rows
from llmserve.runners.protocol import SamplingRow, StepResult, TokenLogprobs

__all__ = ["native_prompt_logprobs", "native_sample"]


def native_sample(
    kernels: ModuleType, path: str, logits: np.ndarray, rows: list[SamplingRow]
) -> StepResult:
    """One token for each row of `logits` [R, V], of which a copy is changed."""
    packed = pack_rows(rows)
    drawn = DrawnRows(packed, logits.shape[1])
    kernels.sample(
        path,
        logits.copy(),
        packed.constants,
        packed.positions,
        packed.edits,
        drawn.token_ids,
        drawn.is_usable,
        drawn.logprobs.logprobs,
        drawn.logprobs.num_top,
        drawn.logprobs.top_ids,
        drawn.logprobs.top_logprobs,
    )
    return drawn.result()


def native_prompt_logprobs(
    kernels: ModuleType, path: str, logits: np.ndarray, targets: list[int], num_top: int
) -> list[TokenLogprobs]:
    """Log-probability of `targets[i]` after row i of `logits` [n, V], and the likeliest ids."""
    out = LogprobArrays(len(targets), num_top, logits.shape[1])
    kernels.prompt_logprobs(
        path,
        logits,
        np.array(targets, dtype=np.int64),
        num_top,
        out.logprobs,
        out.num_top,
        out.top_ids,
        out.top_logprobs,
    )
    return out.entries(range(len(targets)))
