"""What the engine itself costs: microseconds of a step beside the runner's own time.

A runner without a model answers every row at once, so what is left is scheduling, blocks, batch,
advance and outputs. All sequences decode; each has a stop id, `max_tokens`, and a new block every
16 tokens, and every output is made. Detokenizing is not part of the engine. The runner's share is
timed apart and taken off.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from datetime import datetime

import orjson

from llmserve.engine.config import EngineConfig
from llmserve.engine.engine import Engine
from llmserve.engine.request import Request
from llmserve.errors import ConfigError
from llmserve.runners.protocol import Batch, CacheGroup, RunnerInfo, StepResult
from llmserve.sampling import SamplingParams

from .machine import command_line, machine, versions

__all__ = ["EngineCostOptions", "bench_engine_cost", "engine_cost_options", "measure_step"]

VOCAB_SIZE = 1000
PROMPT_LEN = 32
STOP_ID = VOCAB_SIZE - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCostOptions:
    """One measurement."""

    sizes: tuple[int, ...] = (1, 32, 256, 1024)
    """Running sequences, ascending."""
    steps: int = 300
    """Steps of one run."""
    repeats: int = 3
    """Runs of each size, in turn."""

    def __post_init__(self) -> None:
        if not self.sizes or min(*self.sizes, self.steps, self.repeats) < 1:
            raise ConfigError("sizes, steps and repeats must be at least 1")


def engine_cost_options(args: argparse.Namespace) -> EngineCostOptions:
    """The options behind the arguments of the command line. Raises `ConfigError`."""
    try:
        sizes = tuple(sorted({int(part) for part in args.num_seqs.split(",")}))
    except ValueError:
        raise ConfigError(
            f"--num-seqs takes whole numbers like 1,32,256, got {args.num_seqs!r}"
        ) from None
    return EngineCostOptions(sizes=sizes, steps=args.steps, repeats=args.repeats)


def bench_engine_cost(options: EngineCostOptions) -> int:
    """Measure and print table and JSON; the exit code."""
    runs: dict[int, list[float]] = {size: [] for size in options.sizes}
    for _ in range(options.repeats):
        for size in options.sizes:
            runs[size].append(measure_step(size, options.steps))
    rows = [
        {"num_seqs": size, "step_us": statistics.median(values), "runs": values}
        for size, values in runs.items()
    ]
    print(f"{'sequences':<12}{'us a step':>12}{'us a sequence':>16}")
    for size, values in runs.items():
        step_us = statistics.median(values)
        print(f"{size:<12}{step_us:>12.1f}{step_us / size:>16.2f}")
    result = {
        "benchmark": "engine",
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "steps": options.steps,
        "sizes": rows,
        "machine": machine(),
        "versions": versions(("numpy",)),
        "command": command_line(),
    }
    print(orjson.dumps(result).decode(), flush=True)
    return 0


def measure_step(num_seqs: int, num_steps: int) -> float:
    """Mean microseconds of a step with `num_seqs` decoding sequences, the runner's share off."""
    runner = _InstantRunner(max_seq_len=PROMPT_LEN + 2 * num_steps + 64)
    engine = _full_engine(runner, num_seqs)
    runner.seconds = 0.0
    start_s = time.perf_counter()
    num_outputs = sum(len(engine.step(0.0)) for _ in range(num_steps))
    seconds = time.perf_counter() - start_s - runner.seconds
    assert num_outputs == num_seqs * num_steps, "a sequence did not decode in every step"
    return 1e6 * seconds / num_steps


def _full_engine(runner: _InstantRunner, num_seqs: int) -> Engine:
    """An engine with all its sequences past their prompts."""
    max_seq_len = runner.info.max_seq_len
    config = EngineConfig(
        num_blocks=(num_seqs * -(-max_seq_len // 16),),
        max_seq_len=max_seq_len,
        max_batched_tokens=max(2048, num_seqs),
        max_num_seqs=num_seqs,
    )
    engine = Engine(runner, config)
    for index in range(num_seqs):
        prompt = [index % 100, index // 100, *range(2, PROMPT_LEN)]
        params = SamplingParams(
            max_tokens=max_seq_len - PROMPT_LEN, temperature=0.0, stop_token_ids=(STOP_ID,)
        )
        engine.add_request(
            Request(request_id=str(index), prompt_token_ids=prompt, sampling_params=params, seed=0)
        )
    while len(engine.step(0.0)) < num_seqs:
        pass
    return engine


class _InstantRunner:
    """Draws a token that follows from its position alone. Implements `Runner`."""

    overlaps = False

    def __init__(self, *, max_seq_len: int) -> None:
        self.info = RunnerInfo(
            vocab_size=VOCAB_SIZE,
            max_seq_len=max_seq_len,
            eos_token_ids=(),
            cache_groups=(CacheGroup(num_layers=1, window=None, bytes_per_token=1),),
            runner="instant",
            executed_form="none",
            cache_dtype="none",
            num_parameters=0,
            weight_bytes=0,
        )
        self.seconds = 0.0
        self._result: StepResult | None = None

    def allocate_cache(self, num_blocks: tuple[int, ...], block_size: int) -> None:
        """There is none."""

    def submit(self, batch: Batch) -> None:
        start_s = time.perf_counter()
        self._result = StepResult(token_ids=batch.positions[batch.logits_indices] % STOP_ID)
        self.seconds += time.perf_counter() - start_s

    def collect(self) -> StepResult:
        assert self._result is not None, "nothing was submitted"
        return self._result

    def close(self) -> None:
        """Nothing is held."""
