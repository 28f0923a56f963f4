"""A quantized model against its original, both in torch and float32, over the same windows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch

from llmserve.checkpoint import Checkpoint
from llmserve.model.transformer import Transformer
from llmserve.model.weights import load_canonical

from .int8_cache import Int8CacheAttention
from .measure import Comparison, LanguageModel, compare_models
from .quantize import QuantizedModel

__all__ = ["Progress", "measure_model"]

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, how much of it is done and how much there is."""


def measure_model(
    source: Checkpoint, reference: Transformer, model: QuantizedModel,
    windows: Sequence[Sequence[int]], on_progress: Progress, *, has_int8_cache: bool = False,
) -> Comparison:  # fmt: skip
    """Compare `model` with `reference`, the original of `source`, over `windows`.

    With `has_int8_cache` the quantized model reads its keys and values back from int8.
    """
    candidate = copy.deepcopy(reference)
    weights = {name: torch.tensor(model.float32(source, name)) for name in source.names()}
    load_canonical(candidate, weights)
    stage = "measuring the KV cache" if has_int8_cache else "measuring"
    run: LanguageModel = candidate
    if has_int8_cache:
        run = partial(candidate, attend=Int8CacheAttention(source.config))
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        on_progress(stage, done, len(windows))

    on_progress(stage, 0, len(windows))
    return compare_models(reference, run, windows, on_window=count)
