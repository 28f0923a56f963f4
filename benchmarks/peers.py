"""`llmserve bench peers`: ours and other programs on one model, in process and over HTTP.

One document and one table from one run: first the engines in process (`offline_peers.py`), all
loaded at once and asked in turn, then the servers (`peers_http.py`), started and stopped in turn.
Rounds go on until there are as many as asked for or the next would not end within the budget; one
of each half is always whole. A peer that fails is left out from then on, and the document says why.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import orjson

from llmserve.checkpoint import Checkpoint
from llmserve.durable import write_bytes
from llmserve.errors import ConfigError, LLMServeError
from llmserve.text.tokenizer import Tokenizer

from .machine import command_line, machine, versions
from .offline_contenders import OfflineOptions, contenders
from .offline_peers import OfflineRounds, OfflineRow, loaded_rows
from .peer_servers import servers_of
from .peers_http import HttpLoad, HttpRow, measure_server, round_prompts, rows_for
from .peers_report import peers_markdown
from .workload import Prompt

__all__ = ["Budget", "PeersOptions", "bench_peers"]

PROCESS_SHARE = 0.35
"""Of the budget; servers take what is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeersOptions:
    """One comparison."""

    offline: OfflineOptions
    """Model, schemes, peers, and what is measured in process; its `repeats` are most rounds."""
    load: HttpLoad
    budget_s: float = math.inf
    """Time for all rounds; loading and converting are not in it."""
    vllm: Path | None = None
    """Python that has vLLM, which takes part over HTTP; None: without it."""
    shape: str | None = None
    """Which of `SHAPES` the model is: bars are set for these; None: another model."""
    out: Path | None = None
    """Folder for the document and the page; None: they are printed only."""

    def __post_init__(self) -> None:
        if not self.budget_s > 0:
            raise ConfigError(f"--budget must be above 0 minutes, got {self.budget_s / 60:g}")
        for concurrency, count in self.load.requests.items():
            if not 1 <= concurrency <= count:
                raise ConfigError(
                    f"--requests needs at least as many as come at a time: {count} for "
                    f"{concurrency}"
                )


class Budget:
    """Says whether one more round ends in time, from the longest so far."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start_s = self._last_s = clock()
        self._seconds = seconds
        self._longest_s: float | None = None

    def has_room(self) -> bool:
        """To be asked before each round; the first always has room."""
        now_s = self._clock()
        round_s, self._last_s = now_s - self._last_s, now_s
        if self._longest_s is None:
            self._longest_s = 0.0
            return True
        self._longest_s = max(self._longest_s, round_s)
        return now_s + self._longest_s <= self._start_s + self._seconds


def bench_peers(options: PeersOptions) -> int:
    """Run the comparison, print the table and JSON, save both; the exit code.

    0: every peer named was measured. 1: one failed.

    Raises:
        ConfigError: a form of the model or a peer is missing.
        LLMServeError: one of our own engines failed, or the result could not be saved.
    """
    offline, load = options.offline, options.load
    loaders = list(contenders(offline))  # every path is checked before anything is loaded
    rows = rows_for(
        servers_of(
            offline,
            slots=max(load.requests),
            request_len=load.input_len + load.output_len,
            vllm=options.vllm,
        )
    )
    checkpoint = Checkpoint.open(offline.model, verify=False)
    start_s = time.monotonic()
    with loaded_rows(loaders) as engines:
        budget = Budget(options.budget_s * PROCESS_SHARE)
        rounds = OfflineRounds(engines, offline, vocab_size=checkpoint.config.vocab_size)
        _repeat(rounds.take, offline.repeats, budget)
        in_process = [_process_item(engine) for engine in engines]
    _http_rounds(options, rows, options.budget_s - (time.monotonic() - start_s))
    document = _document(options, [*in_process, *map(_http_item, rows)], rounds.memory_rates)
    page = peers_markdown(document)
    print(page)
    print(orjson.dumps(document).decode(), flush=True)
    if options.out is not None:
        _save(options, options.out, document, page)
    problems = [row for row in rows if row.problem]
    for row in problems:
        print(f"left out: {row.server.engine} {row.weights}: {row.problem}", file=sys.stderr)
    return 1 if problems else 0


def _http_rounds(options: PeersOptions, rows: list[HttpRow], budget_s: float) -> None:
    tokenizer = Tokenizer.load(options.offline.model)
    rng = np.random.default_rng(options.offline.seed)
    number = 0

    def take() -> None:
        nonlocal number
        number += 1
        prompts = round_prompts(tokenizer, options.load, rng)
        for row in rows:
            if row.problem is None:
                _measure(row, options.load, prompts, number)

    _repeat(take, options.offline.repeats, Budget(budget_s))


def _measure(row: HttpRow, load: HttpLoad, prompts: dict[int, list[Prompt]], number: int) -> None:
    try:
        measure_server(row, load, prompts)
    except LLMServeError as error:
        if row.server.is_ours:
            raise
        row.problem = str(error).splitlines()[0]
        print(f"round {number}, {row.server.engine}: {row.problem}", file=sys.stderr, flush=True)
        return
    rates = ", ".join(f"{row.figures[f'http {count} tokens/s'][-1]:.1f}" for count in load.requests)
    name = f"{row.server.engine} {row.weights}"
    print(f"round {number}, http, {name}: {rates} tokens/s", file=sys.stderr, flush=True)


def _repeat(take: Callable[[], None], most: int, budget: Budget) -> None:
    for _ in range(most):
        if not budget.has_room():
            return
        take()


def _process_item(row: OfflineRow) -> dict[str, object]:
    return {
        "surface": "process",
        "scheme": row.scheme,
        "is_ours": row.is_ours,
        **row.contender.description,
        "figures": {f"{name} tokens/s": rates for name, rates in row.rates.items()},
        "problem": None,
    }


def _http_item(row: HttpRow) -> dict[str, object]:
    return {
        "surface": "http",
        "scheme": row.server.scheme,
        "is_ours": row.server.is_ours,
        "engine": row.server.engine,
        "weights": row.weights,
        "cache": row.cache,
        "versions": row.versions or versions(("numpy",)),
        "figures": row.figures,
        "problem": row.problem,
    }


def _document(
    options: PeersOptions, rows: list[dict[str, object]], memory_rates: list[float]
) -> dict[str, object]:
    offline, load = options.offline, options.load
    return {
        "benchmark": "peers",
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "model": offline.model.name,
        "shape": options.shape,
        "prefill_len": offline.prefill_len,
        "input_len": offline.input_len,
        "decode_len": offline.output_len,
        "sequences": list(offline.sequences),
        "busy": list(offline.busy),
        "memory_bytes_per_s": memory_rates,
        "load": {**asdict(load), "requests": {str(k): v for k, v in load.requests.items()}},
        "budget_s": options.budget_s if math.isfinite(options.budget_s) else None,
        "seed": offline.seed,
        "rows": rows,
        "machine": machine(),
        "versions": versions(("numpy",)),
        "command": command_line(),
    }


def _save(options: PeersOptions, out: Path, document: dict[str, object], page: str) -> None:
    stem = f"peers-{options.offline.model.name}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_bytes(out / f"{stem}.json", orjson.dumps(document, option=orjson.OPT_INDENT_2))
        write_bytes(out / f"{stem}.md", page.encode())
    except OSError as error:
        raise LLMServeError(f"cannot save the comparison in {out}: {error}") from error
    print(f"saved as {out / stem}.json and .md", file=sys.stderr)
