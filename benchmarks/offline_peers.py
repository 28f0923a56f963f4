"""`llmserve bench offline`: our engine and others on the same model, in turn, in one run.

Every engine is loaded once, in a process of its own (llama.cpp's programs load anew each time).
Within a repeat all of them take turns at each measurement, so that a change of the machine's speed
meets all, each after a rest in which the threads of the one before end their spinning; medians and
ranges are reported, and ratios are taken within a repeat. Measured are

- prefill: prompt tokens per second from a prompt of 512 to its first token;
- decode: tokens per second of N sequences together, each after a prompt of its own whose time does
  not count; where asked, once more while another process keeps a core busy.

The rate at which memory is read is taken before each round.

Prompts are random ids, new ones each time.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
import orjson

from llmserve.checkpoint import Checkpoint

from .machine import command_line, machine, versions
from .offline_contenders import Contender, OfflineOptions, contenders
from .offline_limits import MemoryRate, busy_process, wait_for_spinning

__all__ = [
    "OfflineRounds",
    "OfflineRow",
    "bench_offline",
    "loaded_rows",
    "offline_result",
    "offline_table",
    "over_best_peer",
]

OURS = "llmserve"


@dataclass(slots=True, kw_only=True)
class OfflineRow:
    """One engine with one form of the model."""

    scheme: str
    contender: Contender
    rates: dict[str, list[float]] = field(default_factory=dict)
    """Measurement → tokens/s, one for each repeat."""

    @property
    def is_ours(self) -> bool:
        """Whether the engine is llmserve's."""
        engine: str = self.contender.description["engine"]
        return engine.startswith(OURS)

    @property
    def name(self) -> str:
        """Engine, weights and cache."""
        description = self.contender.description
        return f"{description['engine']}: {description['weights']}, {description['cache']} cache"


def bench_offline(options: OfflineOptions) -> int:
    """Run the comparison and print table and JSON; the exit code.

    Raises:
        ConfigError: a form of the model or a peer is missing.
        EngineError: an engine failed.
    """
    loaders = list(contenders(options))  # every path is checked before anything is loaded
    vocab_size = Checkpoint.open(options.model, verify=False).config.vocab_size
    with loaded_rows(loaders) as rows:
        rounds = OfflineRounds(rows, options, vocab_size=vocab_size)
        for _ in range(options.repeats):
            rounds.take()
    print(offline_table(rows))
    result = offline_result(options, rows, rounds.memory_rates)
    print(orjson.dumps(result).decode(), flush=True)
    return 0


@contextmanager
def loaded_rows(
    loaders: Sequence[tuple[str, Callable[[], Contender]]],
) -> Iterator[list[OfflineRow]]:
    """A row with a loaded engine for each scheme and loader; they are closed at the end."""
    with ExitStack() as stack:
        rows = []
        for scheme, load in loaders:
            row = OfflineRow(scheme=scheme, contender=load())
            stack.callback(row.contender.close)
            rows.append(row)
            print(f"loaded {row.name}", file=sys.stderr, flush=True)
        yield rows


class OfflineRounds:
    """The rounds of a comparison; made with one to warm up, which does not count."""

    def __init__(
        self,
        rows: Sequence[OfflineRow],
        options: OfflineOptions,
        *,
        vocab_size: int,
        memory_rate: Callable[[], float | None] | None = None,
        rest: Callable[[], None] = wait_for_spinning,
    ) -> None:
        """`memory_rate` tells the bytes a second now; None: `MemoryRate`. `rest` comes before each
        measurement."""
        self._rows, self._options = rows, options
        self._prompts = _Prompts(np.random.default_rng(options.seed), vocab_size)
        self._num_taken = 0
        self._rest = rest
        self._memory_rate = memory_rate or MemoryRate(options.threads).take
        self.memory_rates: list[float] = []
        """Bytes a second read from memory, before each round; none without our kernels."""
        for _ in self._measure(is_warm_up=True):
            pass

    def take(self) -> None:
        """One more round: every measurement, all rows in turn."""
        self._num_taken += 1
        rate = self._memory_rate()
        self.memory_rates += [] if rate is None else [rate]
        for name, row, rate in self._measure(is_warm_up=False):
            row.rates.setdefault(name, []).append(rate)
            print(
                f"round {self._num_taken}, {name}, {row.name}: {rate:.1f} tokens/s",
                file=sys.stderr,
                flush=True,
            )

    def _measure(self, *, is_warm_up: bool) -> Iterator[tuple[str, OfflineRow, float]]:
        for name, (count, is_busy) in _measurements(self._options).items():
            if is_busy and is_warm_up:
                continue  # the same without company has warmed it up
            for row in self._rows:
                self._rest()
                with busy_process() if is_busy else nullcontext():
                    rate = _measure(row.contender, self._prompts, self._options, count)
                yield name, row, rate


def offline_result(
    options: OfflineOptions, rows: Sequence[OfflineRow], memory_rates: Sequence[float]
) -> dict[str, object]:
    """The JSON document. Rates are tokens/s, of memory bytes/s."""
    return {
        "benchmark": "offline",
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "model": str(options.model),
        "prefill_len": options.prefill_len,
        "input_len": options.input_len,
        "output_len": options.output_len,
        "repeats": options.repeats,
        "seed": options.seed,
        "memory_bytes_per_s": list(memory_rates),
        "rows": [
            {
                "scheme": row.scheme,
                **row.contender.description,
                "measurements": {
                    name: {"median": statistics.median(rates), "runs": rates}
                    for name, rates in row.rates.items()
                },
                "over_best_peer": over_best_peer(row, rows) if row.is_ours else None,
            }
            for row in rows
        ],
        "machine": machine(),
        "versions": versions(("numpy",)),
        "command": command_line(),
    }


def over_best_peer(row: OfflineRow, rows: Sequence[OfflineRow]) -> dict[str, float] | None:
    """Measurement → times the fastest peer of any scheme, the median over the repeats.

    None without peers.
    """
    peers = [peer for peer in rows if not peer.is_ours]
    if not peers:
        return None
    ratios = {}
    for name, rates in row.rates.items():
        best = map(max, zip(*(peer.rates[name] for peer in peers), strict=True))
        ratios[name] = statistics.median(a / b for a, b in zip(rates, best, strict=True))
    return ratios


def offline_table(rows: Sequence[OfflineRow]) -> str:
    """The table for people: medians, ranges beneath them, and ours over the best peer."""
    names = list(rows[0].rates)
    labels = [row.name for row in rows]
    width = max(map(len, [*labels, "tokens/s: median, range"])) + 2
    lines = [f"{'tokens/s: median, range':<{width}}" + "".join(f"{name:>18}" for name in names)]
    for label, row in zip(labels, rows, strict=True):
        runs = [row.rates[name] for name in names]
        medians = "".join(f"{statistics.median(rates):>18.1f}" for rates in runs)
        ranges = "".join(f"{f'{min(rates):.1f}-{max(rates):.1f}':>18}" for rates in runs)
        lines += [f"{label:<{width}}{medians}", f"{'':<{width}}{ranges}"]
        if row.is_ours and (ratios := over_best_peer(row, rows)) is not None:
            shown = "".join(f"{ratios[name]:>18.2f}" for name in names)
            lines.append(f"{'  times the best peer':<{width}}{shown}")
    return "\n".join(lines)


def _measurements(options: OfflineOptions) -> dict[str, tuple[int | None, bool]]:
    """Name → sequences that are decoded, None for the prefill, and whether a core is busy."""
    decodes = {f"decode {count}": (count, False) for count in options.sequences}
    busy = {f"decode {count} busy": (count, True) for count in options.busy}
    return {f"prefill {options.prefill_len}": (None, False), **decodes, **busy}


class _Prompts:
    """Random ids, other ones each time."""

    def __init__(self, rng: np.random.Generator, vocab_size: int) -> None:
        self._rng, self._vocab_size = rng, vocab_size

    def draw(self, count: int, length: int) -> list[list[int]]:
        prompts: list[list[int]] = self._rng.integers(
            self._vocab_size, size=(count, length)
        ).tolist()
        return prompts


def _measure(
    engine: Contender, prompts: _Prompts, options: OfflineOptions, count: int | None
) -> float:
    if count is None:
        return engine.prefill(prompts.draw(1, options.prefill_len)[0])
    return engine.decode(prompts.draw(count, options.input_len), options.output_len)
