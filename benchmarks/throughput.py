"""Offline throughput: output tokens per second of one model at several concurrencies.

Drives the engine directly, as a closed loop of N requests without a server or text: greedy, end
ids ignored, so that every request makes exactly the tokens asked for. The baseline is what one
would write without an engine: a plain torch loop with a contiguous KV cache, one prompt at a time.

Every run draws new prompts, so that no cache of prompts helps; the settings take turns within each
repeat, and ratios are taken within a repeat, so that a change of the machine's speed cancels.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path

import numpy as np
import orjson

from llmserve.engine.engine import Engine
from llmserve.engine.request import FinishReason, Request
from llmserve.errors import ConfigError, EngineError
from llmserve.llm import LLM
from llmserve.runner_arguments import RunnerSettings, runner_settings
from llmserve.sampling import SamplingParams

from .machine import command_line, machine, versions

__all__ = [
    "ThroughputOptions",
    "bench_throughput",
    "engine_rate",
    "measure",
    "plain_rate",
    "throughput_options",
    "throughput_result",
]

PACKAGES = ("numpy", "torch")
PLAIN = "plain loop"

Prompts = list[list[int]]
Rate = Callable[[Prompts], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputOptions:
    """One offline benchmark."""

    model: Path
    """The model folder."""
    num_prompts: int = 16
    """Prompts of one run."""
    concurrency: tuple[int, ...] = (1, 4, 16)
    """Requests under way at a time, ascending; one setting each."""
    input_len: int = 128
    """Tokens of a prompt."""
    output_len: int = 128
    """Tokens of an answer."""
    repeats: int = 3
    """Runs of each setting."""
    has_plain_baseline: bool = False
    """Whether to time the plain loop too."""
    seed: int = 0
    """Of the prompts."""
    running: RunnerSettings = field(default_factory=RunnerSettings)
    """How the model is computed."""
    is_verified: bool = True
    """Whether the folder's files are checked against its manifest."""

    def __post_init__(self) -> None:
        counts = (self.num_prompts, self.input_len, self.output_len, self.repeats)
        if min(*counts, *self.concurrency) < 1 or self.seed < 0:
            raise ConfigError("prompts, lengths, repeats and concurrencies must be at least 1")
        if self.num_prompts < self.concurrency[-1]:
            raise ConfigError(
                f"{self.num_prompts} prompts cannot keep {self.concurrency[-1]} requests under "
                "way: raise --num-prompts"
            )


def throughput_options(args: argparse.Namespace) -> ThroughputOptions:
    """The options behind the arguments of the command line. Raises `ConfigError`."""
    try:
        concurrency = tuple(sorted({int(part) for part in args.concurrency.split(",")}))
    except ValueError:
        raise ConfigError(
            f"--concurrency takes whole numbers like 1,4,16, got {args.concurrency!r}"
        ) from None
    return ThroughputOptions(
        model=args.model,
        num_prompts=args.num_prompts,
        concurrency=concurrency,
        input_len=args.input_len,
        output_len=args.output_len,
        repeats=args.repeats,
        has_plain_baseline=args.baseline == "plain",
        seed=args.seed,
        running=runner_settings(args),
        is_verified=not args.no_verify,
    )


def bench_throughput(options: ThroughputOptions) -> int:
    """Run the benchmark and print table and JSON; the exit code.

    Raises:
        CheckpointError: the folder cannot be used.
        ConfigError: the prompts and answers do not fit the model or its cache.
    """
    most = options.concurrency[-1]
    llm = LLM(options.model, max_num_seqs=most, verify=options.is_verified, **options.running)
    with llm:
        _check_fits(options, llm.engine)
        settings: dict[str, Rate] = {
            _name(n): _engine_setting(llm.engine, options, n) for n in options.concurrency
        }
        if options.has_plain_baseline:
            settings = {PLAIN: _plain_setting(llm, options), **settings}
        rates = measure(settings, options, vocab_size=llm.info.vocab_size)
        result = throughput_result(options, rates)
        result["runner"] = llm.info.runner
        result["executed_form"] = llm.info.executed_form
        result["cache_dtype"] = llm.info.cache_dtype
    print(_table(result))
    print(orjson.dumps(result).decode(), flush=True)
    return 0


def measure(
    settings: dict[str, Rate], options: ThroughputOptions, *, vocab_size: int
) -> dict[str, list[float]]:
    """Output tokens/s of every setting, one figure per repeat; the settings take turns.

    Each setting runs one short prompt first, which does not count: first calls allocate.
    """
    rng = np.random.default_rng(options.seed)
    for rate in settings.values():
        rate(_draw(rng, vocab_size, (1, options.input_len)))
    rates: dict[str, list[float]] = {name: [] for name in settings}
    for repeat in range(1, options.repeats + 1):
        for name, rate in settings.items():
            prompts = _draw(rng, vocab_size, (options.num_prompts, options.input_len))
            rates[name].append(rate(prompts))
            print(
                f"repeat {repeat}/{options.repeats}, {name}: {rates[name][-1]:.1f} tokens/s",
                file=sys.stderr,
                flush=True,
            )
    return rates


def engine_rate(
    engine: Engine,
    prompts: Prompts,
    *,
    output_len: int,
    concurrency: int,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Output tokens/s of `engine` over `prompts`, `concurrency` under way at a time.

    Raises `EngineError` if a request does not end with all its tokens.
    """
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=output_len)
    waiting = iter(
        Request(request_id=f"bench-{i}", prompt_token_ids=ids, sampling_params=params, seed=0)
        for i, ids in enumerate(prompts)
    )
    num_tokens = 0
    start_s = clock()
    for first in islice(waiting, concurrency):
        engine.add_request(first)
    while engine.has_work:
        for output in engine.step(clock()):
            num_tokens += len(output.token_ids)
            if output.finish_reason not in (None, FinishReason.LENGTH):
                raise EngineError(f"a request ended as {output.finish_reason}: {output.error}")
            if output.finish_reason and (following := next(waiting, None)):
                engine.add_request(following)
    seconds = clock() - start_s
    if num_tokens != output_len * len(prompts):
        raise EngineError(f"{num_tokens} tokens came, not {output_len} for each prompt")
    return num_tokens / seconds


def plain_rate(
    generate: Callable[[list[int], int], list[int]],
    prompts: Prompts,
    *,
    output_len: int,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Output tokens/s of `generate(prompt, num_tokens)` over `prompts`, one after another."""
    start_s = clock()
    num_tokens = sum(len(generate(ids, output_len)) for ids in prompts)
    return num_tokens / (clock() - start_s)


def throughput_result(
    options: ThroughputOptions, rates: dict[str, list[float]]
) -> dict[str, object]:
    """The JSON document. Rates are output tokens/s; ratios are medians over the repeats."""
    one, plain = rates.get(_name(1)), rates.get(PLAIN)
    return {
        "benchmark": "throughput",
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "model": str(options.model),
        "num_prompts": options.num_prompts,
        "input_len": options.input_len,
        "output_len": options.output_len,
        "repeats": options.repeats,
        "seed": options.seed,
        "concurrency": [
            {
                "concurrency": n,
                "output_throughput": statistics.median(rates[_name(n)]),
                "runs": rates[_name(n)],
                "ratio_to_one_stream": _ratio(rates[_name(n)], one),
            }
            for n in options.concurrency
        ],
        "plain": plain and {"output_throughput": statistics.median(plain), "runs": plain},
        "one_stream_over_plain": one and _ratio(one, plain),
        "machine": machine(),
        "versions": versions(PACKAGES),
        "command": command_line(),
    }


def _ratio(rates: Sequence[float], base: Sequence[float] | None) -> float | None:
    if base is None:
        return None
    return statistics.median(rate / of for rate, of in zip(rates, base, strict=True))


def _name(concurrency: int) -> str:
    return f"{concurrency} at a time"


def _engine_setting(engine: Engine, options: ThroughputOptions, concurrency: int) -> Rate:
    return lambda prompts: engine_rate(
        engine, prompts, output_len=options.output_len, concurrency=concurrency
    )


def _plain_setting(llm: LLM, options: ThroughputOptions) -> Rate:
    from llmserve.model.plain import generate_plain
    from llmserve.model.weights import load_model
    from llmserve.runners.registry import use_torch_threads

    model = load_model(llm.checkpoint)
    use_torch_threads(options.running.get("threads"), num_parameters=llm.info.num_parameters)
    return lambda prompts: plain_rate(
        lambda ids, num_tokens: generate_plain(model, ids, num_tokens),
        prompts,
        output_len=options.output_len,
    )


def _check_fits(options: ThroughputOptions, engine: Engine) -> None:
    tokens, config = options.input_len + options.output_len, engine.config
    if tokens > config.max_seq_len:
        raise ConfigError(
            f"prompt and answer make {tokens} tokens; the model's context is {config.max_seq_len}: "
            "lower --input-len or --output-len"
        )
    room = config.num_blocks[0] // -(-tokens // config.block_size)
    if room < options.concurrency[-1]:
        raise ConfigError(
            f"the KV cache holds {room} requests of {tokens} tokens, not {options.concurrency[-1]}"
        )


def _draw(rng: np.random.Generator, vocab_size: int, shape: tuple[int, int]) -> Prompts:
    prompts: Prompts = rng.integers(vocab_size, size=shape).tolist()
    return prompts


def _table(result: dict[str, object]) -> str:
    rows = result["concurrency"]
    assert isinstance(rows, list)
    lines = [f"{'requests at a time':<20}{'output tokens/s':>18}{'x one stream':>14}"]
    for row in rows:
        ratio = row["ratio_to_one_stream"]
        shown = "-" if ratio is None else f"{ratio:.2f}"
        lines.append(f"{row['concurrency']:<20}{row['output_throughput']:>18.1f}{shown:>14}")
    if isinstance(plain := result["plain"], dict):
        lines.append(f"{PLAIN:<20}{plain['output_throughput']:>18.1f}")
    if (over := result["one_stream_over_plain"]) is not None:
        lines.append(f"one stream is {over:.2f} times the plain loop")
    return "\n".join(lines)
