"""`llmserve bench quality`: what a model's forms cost, weigh and give, as they are executed.

Every form computes the same windows of a text; the float folder in float32 is the reference. Each
quantized folder is executed twice on the native runner: its weights times float32, which is what
the rounding of the weights alone costs, and times integer activations, which is what is served. The
output layer is as stored and the cache float32 in all of them, so that nothing else differs. A
folder with a graph is executed by the ONNX runner, as it was exported.

Shapes: n tokens of a window, V vocab_size.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import orjson

from llmserve.checkpoint import Checkpoint
from llmserve.durable import write_bytes
from llmserve.errors import ConfigError, LLMServeError
from llmserve.runners.native_options import NativeOptions
from llmserve.runners.native_runner import NativeRunner
from llmserve.runners.protocol import Batch, GroupTables, Runner
from llmserve.text.tokenizer import Tokenizer

from .machine import command_line, machine, versions
from .quality_page import quality_markdown, quality_plot
from .quality_speed import ROWS, decode_rates, form_bytes

__all__ = ["FormCost", "QualityOptions", "bench_quality", "measure_quality", "quality_options"]

BLOCK_SIZE = 16

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityOptions:
    """One comparison of forms."""

    model: Path
    """The folder that is the reference, not quantized."""
    forms: tuple[Path, ...]
    """Quantized folders of it, or folders with a graph."""
    text: Path
    """What is computed; UTF-8."""
    window: int = 256
    """Tokens computed together, each window by itself."""
    max_tokens: int = 6144
    """Most tokens of the text that are computed."""
    repeats: int = 3
    """Rounds in which the forms decode; 0: their speed is not measured."""
    out: Path | None = None
    """Folder for the document, the page and the plot; None: they are printed only."""

    def __post_init__(self) -> None:
        if self.window < 2 or self.max_tokens < self.window:
            raise ConfigError(
                f"--window must be at least 2 and --max-tokens a window or more, got {self.window} "
                f"and {self.max_tokens}"
            )
        if self.repeats < 0:
            raise ConfigError(f"--repeats must be at least 0, got {self.repeats}")


class ComparedRunner(Runner, Protocol):
    """A runner that lets its logits be seen."""

    def logits(self, tokens: range) -> npt.NDArray[np.float32]:
        """Of tokens of the last step, [n, V]."""


@dataclass(slots=True)
class FormCost:
    """One form over all windows."""

    name: str
    """Folder and activations."""
    folder: Path
    is_served: bool
    """Whether it is executed as a server does."""
    kls: list[float] = field(default_factory=list)
    """Nats per token against the reference, for each window."""
    losses: list[float] = field(default_factory=list)
    """Nats per token of the text, for each window."""

    @property
    def kl(self) -> float:
        """Mean KL divergence, nats per token."""
        return statistics.fmean(self.kls)

    @property
    def perplexity(self) -> float:
        """Of the text."""
        return float(np.exp(statistics.fmean(self.losses)))


def quality_options(args: argparse.Namespace) -> QualityOptions:
    """The options behind the arguments of the command line. Raises `ConfigError`."""
    return QualityOptions(
        model=args.model,
        forms=tuple(args.forms),
        text=args.text,
        window=args.window,
        max_tokens=args.max_tokens,
        repeats=args.repeats,
        out=args.out,
    )


def bench_quality(options: QualityOptions) -> int:
    """Measure and print table and JSON; the exit code.

    Raises:
        CheckpointError: a folder cannot be used.
        ConfigError: the text is too short, or a folder is no form of the model.
    """
    costs = measure_quality(options)
    folders = [options.model, *options.forms]
    rates = decode_rates(folders, repeats=options.repeats) if options.repeats else {}
    result = {
        "benchmark": "quality",
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "model": options.model.name,
        "window": options.window,
        "tokens": options.window * len(costs[0].losses),
        "rows": list(ROWS),
        "repeats": options.repeats,
        "forms": [_item(cost, rates) for cost in costs],
        "machine": machine(),
        "versions": versions(("numpy",)),
        "command": command_line(),
    }  # fmt: skip
    print(quality_markdown(result))
    print(orjson.dumps(result).decode(), flush=True)
    if options.out is not None:
        _save(options.out, result)
    return 0


def _item(cost: FormCost, rates: Mapping[Path, Mapping[int, list[float]]]) -> dict[str, object]:
    timed = rates.get(cost.folder) if cost.is_served else None
    return {
        "form": cost.name,
        "is_served": cost.is_served,
        "bytes": form_bytes(cost.folder),
        "tokens_per_s": None if timed is None else {str(n): runs for n, runs in timed.items()},
        "kl": cost.kl,
        "kl_standard_error": _error(cost),
        "perplexity": cost.perplexity,
    }


def _save(out: Path, result: Mapping[str, Any]) -> None:
    stem = f"quality-{result['model']}"
    files = {
        f"{stem}.json": orjson.dumps(result, option=orjson.OPT_INDENT_2),
        f"{stem}.md": quality_markdown(result, f"{stem}.svg").encode(),
        f"{stem}.svg": quality_plot(result).encode(),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_bytes(out / name, data)
    except OSError as error:
        raise LLMServeError(f"cannot save the result in {out}: {error}") from error


def measure_quality(options: QualityOptions) -> list[FormCost]:
    """The reference, then each folder with float32 and with integer activations."""
    reference = Checkpoint.open(options.model)
    if reference.quantization is not None:
        raise ConfigError(f"{options.model} is quantized; the reference must not be")
    with contextlib.ExitStack() as stack:
        costs = [FormCost(options.model.name, options.model, is_served=True)]
        runners: list[ComparedRunner] = [_loaded(stack, reference, "float32")]
        for folder in options.forms:
            checkpoint = Checkpoint.open(folder)
            if checkpoint.config.vocab_size != reference.config.vocab_size:
                raise ConfigError(f"{folder} has another vocabulary than {options.model}")
            if not checkpoint.has_weights:
                costs.append(FormCost(f"{folder.name}, ONNX", folder, is_served=True))
                runner = stack.enter_context(contextlib.closing(_graph(checkpoint)))
                runners.append(runner)
                continue
            activations: Literal["float32", "integer"]
            for activations in ("float32", "integer"):
                name = f"{folder.name}, {activations} activations"
                costs.append(FormCost(name, folder, is_served=activations == "integer"))
                runners.append(_loaded(stack, checkpoint, activations))
        for ids in _windows(options):
            exact = _logprobs(runners[0], ids)
            for cost, runner in zip(costs, runners, strict=True):
                found = exact if cost is costs[0] else _logprobs(runner, ids)
                cost.kls.append(float((np.exp(exact) * (exact - found)).sum(axis=1).mean()))
                cost.losses.append(float(-found[np.arange(len(ids) - 1), ids[1:]].mean()))
    return costs


def _graph(checkpoint: Checkpoint) -> ComparedRunner:
    from llmserve.runners.onnx_runner import OnnxRunner

    return OnnxRunner(checkpoint)


def _loaded(
    stack: contextlib.ExitStack, checkpoint: Checkpoint, activations: Literal["float32", "integer"]
) -> NativeRunner:
    options = NativeOptions(activations=activations, head_weights="float", cache_dtype="float32")
    dtype = "float32" if checkpoint.quantization is None else None
    runner = NativeRunner(checkpoint, options, dtype=dtype)
    return stack.enter_context(contextlib.closing(runner))


def _windows(options: QualityOptions) -> list[list[int]]:
    """Whole windows of the text's tokens."""
    try:
        text = options.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the text {options.text}: {error}") from error
    ids = Tokenizer.load(options.model).encode(text)[: options.max_tokens]
    starts = range(0, len(ids) - options.window + 1, options.window)
    if not starts:
        raise ConfigError(f"{options.text} has {len(ids)} tokens, less than one window")
    return [ids[start : start + options.window] for start in starts]


def _logprobs(runner: ComparedRunner, ids: list[int]) -> Doubles:
    """Log-softmax after every token of a window, [n, V]."""
    num_blocks = -(-len(ids) // BLOCK_SIZE)
    num_groups = len(runner.info.cache_groups)
    runner.allocate_cache((num_blocks,) * num_groups, BLOCK_SIZE)
    places = np.arange(len(ids))
    tables = GroupTables(
        slot_mapping=places,
        block_tables=np.arange(num_blocks)[None],
        block_copies=np.empty((0, 2), np.int64),
    )
    runner.submit(
        Batch(
            token_ids=np.array(ids),
            positions=places,
            cu_seqlens=np.array([0, len(ids)]),
            context_lens=np.array([len(ids)]),
            groups=[tables] * num_groups,
            logits_indices=places,
            sampling=[],
        )
    )
    runner.collect()
    logits = runner.logits(range(len(ids))).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    found: Doubles = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return found


def _error(cost: FormCost) -> float:
    """Standard error of the mean KL, over windows."""
    count = len(cost.kls)
    return 0.0 if count < 2 else statistics.stdev(cost.kls) / count**0.5
