"""How many tokens a step may have, found by trying: a full step is to stay under a given time.

The largest step decides how long everybody waits while somebody's prompt is computed, and a small
one wastes the machine. So at load a few steps of each size are timed, each beside one decode that
waits for it: with a chunk at the end of the longest prompt, the dearest tokens there are, and with
one at its start, where a step of the same time may have many times as many. What decodes read of
a full cache comes on top: it does not depend on the number. Both sizes are fixed for the engine's
life and written to its step log.

How long a step may take follows from the model where nobody says it: one that takes its time to
read its weights anyhow would else read prompts in crumbs, each at the price of all weights. A step
in which nobody decodes may take longer: who waits for a first token waits for all of it.

The engine has no clock; the caller lends one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..runners.protocol import Batch, GroupTables, IntArray, Runner, RunnerInfo, SamplingRow
from ..sampling import SamplingParams
from .config import EngineConfig, StepCost
from .sizing import blocks_of_one

__all__ = ["MOST_TOKENS", "Calibration", "calibrate", "measure_cost"]

MOST_TOKENS = 2048
"""Largest step that is tried; beyond it a CPU gains nothing."""

HEADROOM = 0.8
"""Share of the time given that a step timed alone may take: the rest is for what decodes read, and
for a machine that is not always as fast as it was at load."""

USUAL_STEP_S = 0.05
"""Time of a full step where nobody asks for another, ..."""
SMALLEST_STEPS = 2.5
"""... and how many of the smallest step's it is at the least."""

PREFILL_STEPS = 4.0
"""Times that which a step may take in which nobody decodes, ..."""
LONGEST_PREFILL_S = 1.0
"""... as long as that is no more than this: nothing is cancelled within a step."""

LONGEST_TRIAL_S = 0.25

SIZES = (1, 8, 32, 64, 128, 256, 512, 1024, MOST_TOKENS)
NEAR_SIZES = (128, 512, MOST_TOKENS)
"""Sizes tried at the start of a prompt, after the one found at its end."""
REPEATS = 3
"""Runs of a size after its first, ..."""
ENOUGH_S = 0.05
"""... and the time after which two are enough."""

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was found."""

    max_batched_tokens: int
    """Tokens of the largest step that takes at most the time given, at the start of a prompt."""
    max_prefill_tokens: int
    """Tokens of the largest step in which nobody decodes."""
    far_token_weight: float
    """How many times as many they are as at the end of the longest prompt."""
    full_step_s: float
    """What a step there takes; above the time given where no smaller one is possible."""
    max_step_s: float
    """The time given, or chosen."""
    step_cost: StepCost
    """A line through the times of all sizes."""


def calibrate(
    runner: Runner, config: EngineConfig, *, max_step_s: float | None, clock: Clock
) -> Calibration:
    """Time steps of growing size until one is too long.

    `config` gives context, block size and most sequences; its `max_batched_tokens` is the largest
    size tried. The runner's cache is allocated anew, for one sequence. The result is a block at
    least: less prefill is never scheduled. Without `max_step_s` the time is `USUAL_STEP_S`, and
    `SMALLEST_STEPS` times the smallest step where that is more.
    """
    times = _measure(runner, config, SIZES[:1], max_step_s=math.inf, clock=clock)
    if max_step_s is None:
        max_step_s = max(USUAL_STEP_S, SMALLEST_STEPS * times[SIZES[0]])
    most_s = HEADROOM * max_step_s
    if times[SIZES[0]] <= most_s:
        times |= _measure(runner, config, SIZES[1:], max_step_s=most_s, clock=clock)
    far = _whole_blocks(_largest(times, most_s), config)
    cost = _fit(times)
    sizes = [far, *(size for size in NEAR_SIZES if size > far)]
    near_times = _measure(runner, config, sizes, max_step_s=most_s, clock=clock, is_near=True)
    near = max(far, _whole_blocks(_largest(near_times, most_s), config))
    return Calibration(
        max_batched_tokens=near,
        max_prefill_tokens=max(near, _prefill_tokens(times, near_times, max_step_s, config)),
        far_token_weight=near / far,
        full_step_s=_interpolate(times, far, cost),
        max_step_s=max_step_s,
        step_cost=cost,
    )


def _prefill_tokens(
    times: dict[int, float], near_times: dict[int, float], max_step_s: float, config: EngineConfig
) -> int:
    """Tokens of a step in which nobody decodes, on a line: trying such long ones takes too long."""
    longest_s = max(max_step_s, min(PREFILL_STEPS * max_step_s, LONGEST_PREFILL_S))
    cost = _fit({SIZES[0]: times[SIZES[0]], **near_times})
    affordable = int(max(0.0, longest_s - cost.base_s) / cost.token_s)
    return _whole_blocks(min(affordable, config.max_batched_tokens), config)


def measure_cost(runner: Runner, config: EngineConfig, *, clock: Clock) -> StepCost:
    """The cost of steps up to `config.max_batched_tokens`, for speculation.

    Only as far as a step takes `LONGEST_TRIAL_S`: nobody guesses in longer ones.
    """
    return _fit(_measure(runner, config, SIZES, max_step_s=LONGEST_TRIAL_S, clock=clock))


def _whole_blocks(num_tokens: int, config: EngineConfig) -> int:
    return max(num_tokens - num_tokens % config.block_size, config.block_size)


def _measure(
    runner: Runner, config: EngineConfig, sizes: Sequence[int], *, max_step_s: float, clock: Clock,
    is_near: bool = False,
) -> dict[int, float]:  # fmt: skip
    """Seconds by tokens of a step, up to the first that takes longer than `max_step_s`."""
    runner.allocate_cache(_num_blocks(runner.info, config), config.block_size)
    times: dict[int, float] = {}
    for size in [size for size in sizes if size <= config.max_batched_tokens]:
        batch = _full_step(runner.info, config, size, is_near=is_near)
        times[size] = _least(runner, batch, clock)
        if times[size] > max_step_s:
            break
    return times


def _least(runner: Runner, batch: Batch, clock: Clock) -> float:
    """The least of a few times: whatever disturbs a step makes it longer, its first run above all.

    Long steps are run twice: a server waits for this at its start.
    """
    times: list[float] = []
    while len(times) < 2 or (len(times) <= REPEATS and sum(times) < ENOUGH_S):
        times.append(_timed(runner, batch, clock))
    return min(times)


def _timed(runner: Runner, batch: Batch, clock: Clock) -> float:
    start = clock()
    runner.submit(batch)
    runner.collect()
    return clock() - start


def _largest(times: dict[int, float], max_step_s: float) -> int:
    """Tokens of the largest step within the time, on the line between the sizes tried."""
    best = 0
    sizes = list(times)
    for smaller, larger in zip([0, *sizes], sizes, strict=False):
        if times[larger] <= max_step_s:
            best = larger
            continue
        if smaller and times[larger] > times[smaller]:
            share = (max_step_s - times[smaller]) / (times[larger] - times[smaller])
            best = smaller + int((larger - smaller) * max(0.0, share))
        break
    return best


def _interpolate(times: dict[int, float], num_tokens: int, cost: StepCost) -> float:
    if num_tokens > max(times):
        return cost.seconds(num_tokens)
    return float(np.interp(num_tokens, list(times), list(times.values())))


def _fit(times: dict[int, float]) -> StepCost:
    """Least squares of relative errors, both coefficients kept above 0."""
    sizes = np.array(list(times), dtype=np.float64)
    seconds = np.maximum(np.array(list(times.values())), 1e-9)
    least = float(seconds.min())
    if len(sizes) == 1:
        return StepCost(base_s=least, token_s=least * 1e-3)
    columns = np.stack([1 / seconds, sizes / seconds], axis=1)
    (base, token), *_ = np.linalg.lstsq(columns, np.ones(len(sizes)), rcond=None)
    return StepCost(base_s=max(float(base), least * 0.1), token_s=max(float(token), least * 1e-4))


def _num_blocks(info: RunnerInfo, config: EngineConfig) -> tuple[int, ...]:
    return tuple(
        blocks_of_one(
            group,
            max_seq_len=config.max_seq_len,
            block_size=config.block_size,
            max_batched_tokens=config.max_batched_tokens,
        )
        for group in info.cache_groups
    )


def _full_step(
    info: RunnerInfo, config: EngineConfig, num_tokens: int, *, is_near: bool = False
) -> Batch:
    """One short decode, and chunks at the end of the context, or from its start on.

    All sequences use the same blocks: what they read is as much as if each had its own.
    """
    length = config.max_seq_len
    lengths = [1] + [length] * ((num_tokens - 1) // length)
    if (num_tokens - 1) % length:
        lengths.append((num_tokens - 1) % length)
    ends = lengths[1:] if is_near else [length] * (len(lengths) - 1)
    contexts = [min(length, config.block_size), *ends]
    positions = np.concatenate(
        [np.arange(end - count, end) for end, count in zip(contexts, lengths, strict=True)]
    )
    draws = np.cumsum(lengths) - 1
    params = SamplingParams(temperature=0.0)
    row = SamplingRow(
        params=params, seed=0, choice_index=0, token_ids=[0] * length, num_prompt_tokens=length
    )
    return Batch(
        token_ids=np.arange(num_tokens, dtype=np.int64) % info.vocab_size,
        positions=positions,
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]),
        context_lens=np.array(contexts, dtype=np.int64),
        groups=[
            _tables(count, len(lengths), positions, config) for count in _num_blocks(info, config)
        ],
        logits_indices=draws if info.head is None else draws[:0],
        sampling=[row] * len(lengths) if info.head is None else [],
    )


def _tables(
    num_blocks: int, num_sequences: int, positions: IntArray, config: EngineConfig
) -> GroupTables:
    """One table for all, going round in the pool where that is smaller than the context."""
    table = np.arange(-(-config.max_seq_len // config.block_size)) % num_blocks
    slots = table[positions // config.block_size] * config.block_size
    return GroupTables(
        slot_mapping=slots + positions % config.block_size,
        block_tables=np.tile(table, (num_sequences, 1)),
        block_copies=np.empty((0, 2), dtype=np.int64),
    )
