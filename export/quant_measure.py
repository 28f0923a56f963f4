"""A quantized model against its original, both in torch and float32, over the same windows.

Blocks of both are in memory one at a time, beside the hidden states of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from llmserve.checkpoint import Checkpoint

from .block_stream import BlockStream
from .int8_cache import Int8CacheAttention
from .measure import Comparison, compare_logits
from .quantize import QuantizedModel

__all__ = ["Progress", "measure_model"]

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, how much of it is done and how much there is."""


def measure_model(
    source: Checkpoint, model: QuantizedModel, windows: Sequence[Sequence[int]],
    on_progress: Progress, *, has_int8_cache: bool = False,
) -> Comparison:  # fmt: skip
    """Compare `model` with the original, `source`, over `windows`.

    With `has_int8_cache` the quantized model reads its keys and values back from int8.
    """
    stage = "measuring the KV cache" if has_int8_cache else "measuring"
    total = source.config.num_layers + len(windows)
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        on_progress(stage, done, total)

    on_progress(stage, 0, total)
    before = BlockStream(source, windows)
    after = BlockStream(
        source,
        windows,
        weights=partial(model.float32, source),
        attend=Int8CacheAttention(source.config) if has_int8_cache else None,
    )
    for index in range(source.config.num_layers):
        before.advance(index)
        after.advance(index)
        count()
    before.finish()
    after.finish()
    return compare_logits(before.logits(), after.logits(), windows, on_window=count)
