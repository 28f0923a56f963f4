"""`llmserve bench latency`: what a prompt and a token cost, by how many there are and how long.

One engine in this process, no server: the prefill of one prompt of each length, and a decode step
of each number of sequences at each length of context. The settings take turns within each repeat,
every prompt is new, and medians are told.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np
import orjson

from llmserve.config import ModelConfig
from llmserve.errors import ConfigError

from .latency_limits import DeviceLimits, limits_of, prefill_multiply_adds
from .machine import command_line, machine
from .offline_engine import LlmEngine

__all__ = ["LatencyOptions", "LatencyRow", "bench_latency", "measure_latency", "parse_counts"]

NUM_STEPS = 32
"""Decode steps that are timed together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyOptions:
    """What is timed."""

    model: Path
    runner: str = "auto"
    threads: int | None = None
    """None: the runner's own choice."""
    device: str = "cpu"
    dtype: str | None = None
    """Type of the arithmetic; None: as the folder says."""
    sequences: tuple[int, ...] = (1, 8, 32)
    """Decoded together."""
    contexts: tuple[int, ...] = (128, 512, 1024)
    """Tokens of a prompt: prefilled, or there before the first step that is timed."""
    repeats: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ConfigError(f"--repeats must be at least 1, got {self.repeats}")


@dataclass(slots=True)
class LatencyRow:
    """One length of context."""

    context: int
    prefill_s: list[float] = field(default_factory=list)
    """Of one prompt, up to its first token, in each repeat."""
    step_s: dict[int, list[float]] = field(default_factory=dict)
    """Of one decode step, by sequences, in each repeat."""


def parse_counts(text: str, *, option: str) -> tuple[int, ...]:
    """Whole numbers above 0 from a text like `1,8,32`. Raises `ConfigError`."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise ConfigError(f"{option} takes whole numbers above 0 like 1,8,32, got {text!r}")
    return tuple(sorted({int(part) for part in parts}))


def bench_latency(options: LatencyOptions) -> int:
    """Measure, print a table and, as the last line, JSON; the exit code, 0.

    Raises:
        CheckpointError: the folder cannot be used.
        ConfigError: a setting does not fit the model's context.
    """
    engine = LlmEngine(
        str(options.model),
        runner=options.runner,
        threads=options.threads,
        device=options.device,
        dtype=options.dtype,
        num_cached=max(options.sequences) * (max(options.contexts) + _later_tokens(options)),
    )
    limits = limits_of(options.device, options.dtype or engine.config.dtype)
    with contextlib.closing(engine.llm):
        rows = measure_latency(engine, options)
        described = engine.describe()
    shares = [_shares(row, engine.config, limits, described) for row in rows]
    result = {
        "benchmark": "latency",
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "model": options.model.name,
        **described,
        "repeats": options.repeats,
        "steps": NUM_STEPS,
        "device": options.device,
        "limits": asdict(limits),
        "rows": [
            {
                **share,
                "context": row.context,
                "prefill_ms": 1000.0 * statistics.median(row.prefill_s),
                "prefill_runs_ms": [1000.0 * one for one in row.prefill_s],
                "step_ms": {
                    str(count): 1000.0 * statistics.median(runs)
                    for count, runs in row.step_s.items()
                },
                "step_runs_ms": {
                    str(count): [1000.0 * one for one in runs] for count, runs in row.step_s.items()
                },
            }
            for row, share in zip(rows, shares, strict=True)
        ],
        "machine": machine(),
        "command": command_line(),
    }
    print("\n".join(_table(options, rows, described)))
    print("\n".join(_limits_table(options, rows, limits, shares)))
    print(orjson.dumps(result).decode(), flush=True)
    return 0


def measure_latency(engine: LlmEngine, options: LatencyOptions) -> list[LatencyRow]:
    """Every setting once in each repeat, after one that is not counted.

    Raises:
        ConfigError: a setting does not fit the model's context.
    """
    config = engine.llm.engine.config
    longest = max(options.contexts) + _later_tokens(options)
    if longest > config.max_seq_len:
        raise ConfigError(
            f"a context of {max(options.contexts)} and the steps of {max(options.sequences)} "
            f"sequences need {longest} tokens; the model has {config.max_seq_len}: lower --contexts"
        )
    rng = np.random.default_rng(options.seed)
    vocab_size = engine.llm.info.vocab_size
    rows = [LatencyRow(context) for context in options.contexts]
    for repeat in range(1 + options.repeats):
        for row in rows:
            prefill_s = engine.prefill(_prompts(rng, vocab_size, 1, row.context)[0])
            if repeat:
                row.prefill_s.append(prefill_s)
            for count in options.sequences:
                prompts = _prompts(rng, vocab_size, count, row.context)
                step_s = engine.decode(prompts, NUM_STEPS) / NUM_STEPS
                if repeat:
                    row.step_s.setdefault(count, []).append(step_s)
    return rows


def _later_tokens(options: LatencyOptions) -> int:
    """Most tokens that a prompt of a decode is given, those before the first timed step too."""
    return NUM_STEPS + max(options.sequences) + 1


def _shares(
    row: LatencyRow, config: ModelConfig, limits: DeviceLimits, described: dict[str, object]
) -> dict[str, object]:
    """What is reached of the limits, 0..1, as far as these are known."""
    shares: dict[str, object] = {}
    work = prefill_multiply_adds(config, row.context)
    if work is not None and limits.multiply_adds is not None:
        rate = work / statistics.median(row.prefill_s)
        shares["prefill_share"] = rate / limits.multiply_adds
    weights, token = described.get("weight_bytes"), described.get("token_bytes")
    if isinstance(weights, int) and isinstance(token, int) and limits.read_bytes is not None:
        shares["step_shares"] = {
            str(count): (weights + count * token * (row.context + NUM_STEPS / 2))
            / statistics.median(runs)
            / limits.read_bytes
            for count, runs in row.step_s.items()
        }
    return shares


def _limits_table(
    options: LatencyOptions,
    rows: Sequence[LatencyRow],
    limits: DeviceLimits,
    shares: Sequence[dict[str, object]],
) -> Iterator[str]:
    """Shares of the limits, where there are some."""
    if not any(shares):
        return
    known = [
        (limits.read_bytes, "memory moves {:,.0f} GB/s"),
        (limits.multiply_adds, "matrices make {:,.0f} * 10^9 multiply-adds/s"),
    ]
    yield ""
    yield f"{options.device}: " + ", ".join(
        text.format(value / 1e9) for value, text in known if value is not None
    )
    heads = [f"of memory, {count}" for count in options.sequences]
    yield f"{'context':>8}{'of products':>25}{''.join(f'{head:>16}' for head in heads)}"
    for row, share in zip(rows, shares, strict=True):
        steps = share.get("step_shares")
        assert steps is None or isinstance(steps, dict)
        cells = [None if steps is None else steps[str(count)] for count in options.sequences]
        yield f"{row.context:>8}{_percent(share.get('prefill_share')):>25}" + "".join(
            f"{_percent(cell):>16}" for cell in cells
        )


def _percent(share: object) -> str:
    return f"{share:.0%}" if isinstance(share, float) else "-"


def _prompts(rng: np.random.Generator, vocab_size: int, count: int, length: int) -> list[list[int]]:
    prompts: list[list[int]] = rng.integers(0, vocab_size, (count, length)).tolist()
    return prompts


def _table(
    options: LatencyOptions, rows: Sequence[LatencyRow], described: dict[str, object]
) -> Iterator[str]:
    yield f"{options.model.name}: {described['engine']}, {described['weights']}"
    yield ""
    heads = [f"step of {count}, ms" for count in options.sequences]
    yield f"{'context':>8}{'prefill, ms':>14}{'tokens/s':>11}{''.join(f'{h:>16}' for h in heads)}"
    for row in rows:
        prefill_s = statistics.median(row.prefill_s)
        steps = [1000.0 * statistics.median(row.step_s[count]) for count in options.sequences]
        yield (
            f"{row.context:>8}{1000.0 * prefill_s:>14.2f}{row.context / prefill_s:>11.0f}"
            f"{''.join(f'{step:>16.3f}' for step in steps)}"
        )
