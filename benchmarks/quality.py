"""`llmserve bench quality`: what quantized folders cost as the native runner executes them.

Every form computes the same windows of a text; the float folder in float32 is the reference. Each
quantized folder is executed twice: its weights times float32, which is what the rounding of the
weights alone costs, and times integer activations, which is what is served. The output layer is as
stored and the cache float32 in all of them, so that nothing else differs.

Shapes: n tokens of a window, V vocab_size.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import orjson

from llmserve.checkpoint import Checkpoint
from llmserve.errors import ConfigError
from llmserve.runners.native_options import NativeOptions
from llmserve.runners.native_runner import NativeRunner
from llmserve.runners.protocol import Batch, GroupTables
from llmserve.text.tokenizer import Tokenizer

from .machine import command_line, machine, versions

__all__ = ["FormCost", "QualityOptions", "bench_quality", "measure_quality", "quality_options"]

BLOCK_SIZE = 16

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityOptions:
    """One comparison of forms."""

    model: Path
    """The folder that is the reference, not quantized."""
    forms: tuple[Path, ...]
    """Quantized folders of it."""
    text: Path
    """What is computed; UTF-8."""
    window: int = 256
    """Tokens computed together, each window by itself."""
    max_tokens: int = 6144
    """Most tokens of the text that are computed."""

    def __post_init__(self) -> None:
        if self.window < 2 or self.max_tokens < self.window:
            raise ConfigError(
                f"--window must be at least 2 and --max-tokens a window or more, got {self.window} "
                f"and {self.max_tokens}"
            )


@dataclass(slots=True)
class FormCost:
    """One form over all windows."""

    name: str
    """Folder and activations."""
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
    )


def bench_quality(options: QualityOptions) -> int:
    """Measure and print table and JSON; the exit code.

    Raises:
        CheckpointError: a folder cannot be used.
        ConfigError: the text is too short, or a folder is no form of the model.
    """
    costs = measure_quality(options)
    print(f"{'form':<44}{'KL, nats':>12}{'+-':>11}{'perplexity':>12}")
    for cost in costs:
        print(f"{cost.name:<44}{cost.kl:>12.6f}{_error(cost):>11.6f}{cost.perplexity:>12.4f}")
    result = {
        "benchmark": "quality",
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "window": options.window,
        "tokens": options.window * len(costs[0].losses),
        "forms": [
            {"form": cost.name, "kl": cost.kl, "kl_standard_error": _error(cost),
             "perplexity": cost.perplexity}
            for cost in costs
        ],
        "machine": machine(),
        "versions": versions(("numpy",)),
        "command": command_line(),
    }  # fmt: skip
    print(orjson.dumps(result).decode(), flush=True)
    return 0


def measure_quality(options: QualityOptions) -> list[FormCost]:
    """The reference, then each folder with float32 and with integer activations."""
    reference = Checkpoint.open(options.model)
    if reference.quantization is not None:
        raise ConfigError(f"{options.model} is quantized; the reference must not be")
    with contextlib.ExitStack() as stack:
        runners = [(options.model.name, _loaded(stack, reference, "float32"))]
        for folder in options.forms:
            checkpoint = Checkpoint.open(folder)
            if checkpoint.config.vocab_size != reference.config.vocab_size:
                raise ConfigError(f"{folder} has another vocabulary than {options.model}")
            activations: Literal["float32", "integer"]
            for activations in ("float32", "integer"):
                name = f"{folder.name}, {activations} activations"
                runners.append((name, _loaded(stack, checkpoint, activations)))
        costs = [FormCost(name) for name, _ in runners]
        for ids in _windows(options):
            exact = _logprobs(runners[0][1], ids)
            for cost, (_, runner) in zip(costs, runners, strict=True):
                found = exact if cost is costs[0] else _logprobs(runner, ids)
                cost.kls.append(float((np.exp(exact) * (exact - found)).sum(axis=1).mean()))
                cost.losses.append(float(-found[np.arange(len(ids) - 1), ids[1:]].mean()))
    return costs


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


def _logprobs(runner: NativeRunner, ids: list[int]) -> Doubles:
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
            logits_indices=np.empty(0, np.int64),
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
