"""The HTTP half of the comparison: each server in turn, the same prompts, our own client.

In a round every server is started, asked at each concurrency, and stopped, so that none shares the
machine with another and every round has its share of what changes from start to start. A prompt is
text that the model's own tokenizer counts as the length asked, since not every server takes ids,
and no prompt comes twice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import orjson

from llmserve.errors import ConfigError, EngineError
from llmserve.event_loop import run_loop
from llmserve.text.tokenizer import Tokenizer

from .client import COMPLETIONS_ENDPOINT, Client, Target
from .metrics import LoadMetrics, compute_metrics
from .options import ServeOptions
from .running_server import PeerServer, RunningServer
from .serve import Run, run_load
from .traffic import Traffic
from .workload import Prompt, RandomLengths, align_to_text

__all__ = [
    "HttpLoad",
    "HttpRow",
    "exact_prompts",
    "http_figures",
    "measure_server",
    "round_prompts",
    "rows_for",
]

_REQUEST_TIMEOUT_S = 900.0
_DRAWS = 20  # for each prompt that is wanted
_LEAST_MS = 1e-3  # tokens that come in one chunk have no gap, and a ratio needs one


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLoad:
    """What every server is asked in a round."""

    requests: Mapping[int, int]
    """Requests at a time, ascending → requests in all."""
    input_len: int
    """Tokens of a prompt."""
    output_len: int
    """Tokens of an answer."""


@dataclass(slots=True, kw_only=True)
class HttpRow:
    """One server with one form of the model."""

    server: PeerServer
    weights: str
    cache: str
    versions: dict[str, str]
    figures: dict[str, list[float]] = field(default_factory=dict)
    """Measurement → one figure for each round."""
    problem: str | None = None
    """Why it was left out of later rounds; None: it was not."""


def measure_server(row: HttpRow, load: HttpLoad, prompts: Mapping[int, Sequence[Prompt]]) -> None:
    """Start the server of `row`, load it with `prompts` at each concurrency, and enter the figures.

    Raises:
        LLMServeError: it did not start, or a request failed; nothing of the round is entered.
    """
    with (
        tempfile.TemporaryDirectory(prefix="llmserve-peers-") as folder,
        open(Path(folder) / "log", "wb") as log,
        row.server.start(log) as running,
    ):
        figures = {"ready s": running.wait()}
        for concurrency, sent in prompts.items():
            path = Path(folder) / f"{concurrency}.jsonl"
            path.write_bytes(b"\n".join(orjson.dumps({"prompt": p.content}) for p in sent))
            metrics = _load(row.server, running, load, path, concurrency)
            figures |= http_figures(concurrency, metrics)
        if row.server.is_ours:
            row.weights, row.cache = _executed(running)
        if (resident := running.resident_bytes()) is not None:
            figures["resident MB"] = resident / 1e6
    for name, value in figures.items():
        row.figures.setdefault(name, []).append(value)


def http_figures(concurrency: int, metrics: LoadMetrics) -> dict[str, float]:
    """The figures of one load, by the names that they have in the document."""
    ttft, itl = metrics.latencies["ttft"], metrics.latencies["itl"]
    if ttft is None or itl is None:
        raise EngineError("the server's answers had no second token, so there is no latency")
    return {
        f"http {concurrency} tokens/s": metrics.output_throughput,
        f"http {concurrency} TTFT p50 ms": ttft.median,
        f"http {concurrency} ITL p99 ms": max(itl.percentiles[99.0], _LEAST_MS),
    }


def exact_prompts(
    tokenizer: Tokenizer, count: int, length: int, rng: np.random.Generator
) -> list[Prompt]:
    """`count` texts of random tokens, each of which `tokenizer` counts as exactly `length`.

    Raises:
        ConfigError: its tokens merge so that hardly any text has that length.
    """
    local = _LocalTokenizer(tokenizer)

    async def draw() -> list[Prompt]:
        found: list[Prompt] = []
        for _ in range(count * _DRAWS):
            ids: list[int] = rng.integers(tokenizer.vocab_size, size=length).tolist()
            made = Prompt(index=len(found), content=ids, num_tokens=length, output_len=1)
            aligned = await align_to_text(made, local)
            if aligned.num_tokens == length:
                found.append(aligned)
                if len(found) == count:
                    return found
        raise ConfigError(f"the model's tokenizer makes hardly any text of {length} tokens")

    return run_loop(draw())


class _LocalTokenizer:
    """The model's own tokenizer where `align_to_text` wants a server's."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    async def tokenize(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids)


def _load(
    server: PeerServer, running: RunningServer, load: HttpLoad, path: Path, concurrency: int
) -> LoadMetrics:
    options = ServeOptions(
        base_url=running.base_url,
        endpoint=COMPLETIONS_ENDPOINT,
        model=server.model,
        body=server.body,
        traffic=Traffic(num_prompts=load.requests[concurrency], max_concurrency=concurrency),
        dataset_name="text",
        dataset_path=path,
        lengths=RandomLengths(input_len=load.input_len, output_len=load.output_len),
        request_timeout_s=_REQUEST_TIMEOUT_S,
    )
    run = Run()
    run_loop(run_load(options, run))
    state = run.state
    _check(server, load, run)
    return compute_metrics(
        state.records,
        duration_s=(state.end_s or 0.0) - state.start_s,
        percentiles=(50.0, 99.0),
    )


def _check(server: PeerServer, load: HttpLoad, run: Run) -> None:
    """A failed or shortened answer would make its server look fast."""
    for record in run.state.records:
        if not record.is_success:
            raise EngineError(f"{server.engine}: a request failed: {record.error}")
        if record.output_tokens != load.output_len:
            raise EngineError(
                f"{server.engine}: an answer has {record.output_tokens} tokens, not "
                f"{load.output_len}"
            )


def _executed(running: RunningServer) -> tuple[str, str]:
    """Our own weights and cache, as the server says them."""

    async def ask() -> list[dict[str, object]]:
        async with Client(Target(base_url=running.base_url)) as client:
            return await client.models()

    [card, *_] = run_loop(ask())
    return str(card["executed_form"]), str(card["cache_dtype"])


def round_prompts(
    tokenizer: Tokenizer, load: HttpLoad, rng: np.random.Generator
) -> dict[int, list[Prompt]]:
    """New prompts of one round, the same for every server: one more of each, to settle with."""
    return {
        concurrency: exact_prompts(tokenizer, count + 1, load.input_len, rng)
        for concurrency, count in load.requests.items()
    }


def rows_for(servers: Iterator[PeerServer]) -> list[HttpRow]:
    """A row for each server."""
    return [
        HttpRow(
            server=server,
            weights=server.weights,
            cache=server.cache,
            versions=dict(server.versions),
        )
        for server in servers
    ]
