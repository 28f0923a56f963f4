"""Loss, perplexity and bits per byte of a model on texts, with the uncertainty of each.

A text is read in windows that do not overlap, or, with a stride, in overlapping ones of which only
the last tokens count, so that each is predicted from nearly a whole context. Intervals resample
documents, or the windows of a text that is one document.

Shapes: B windows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from llmserve.errors import ConfigError, DataError
from llmserve.model.transformer import Transformer
from llmserve.text.tokenizer import Tokenizer

from .batches import IGNORED
from .eval_scores import Interval, bootstrap

__all__ = ["TextFigures", "evaluate_texts"]

_WINDOWS_AT_ONCE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFigures:
    """How well a model predicts texts."""

    loss: Interval
    """Nats for each token."""
    perplexity: Interval
    """Tokens that would be as hard to tell apart if all were equally likely."""
    bits_per_byte: Interval
    """Bits that coding the texts with the model would take, for each byte of them."""
    num_documents: int
    """Texts."""
    num_tokens: int
    """Tokens predicted."""
    num_bytes: int
    """UTF-8 bytes of the texts."""


@dataclass(frozen=True, slots=True)
class _Window:
    document: int
    ids: list[int]
    num_counted: int
    """Last ids, whose losses count."""
    share: float
    """Of the document's bytes."""


def evaluate_texts(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: Sequence[str],
    *,
    context: int | None = None,
    stride: int | None = None,
    seed: int = 0,
) -> TextFigures:
    """Predict every token of the documents but each one's first.

    Args:
        model: In float32; no head.
        tokenizer: The model's.
        documents: Texts, each read by itself from its beginning.
        context: Tokens of a window; None: the model's context.
        stride: Tokens that count in each window; None: all of them.
        seed: Of the intervals' resampling.

    Raises:
        ConfigError: a context beyond the model's, or a stride beyond the context.
        DataError: no document has two tokens.
    """
    context = context or model.config.max_seq_len
    stride = stride or context
    if not 1 <= stride <= context <= model.config.max_seq_len:
        raise ConfigError(
            f"context {context} and stride {stride}: the stride must be from 1 to the context, "
            f"which is at most the model's {model.config.max_seq_len}"
        )
    windows = [
        window
        for index, text in enumerate(documents)
        for window in _windows(index, tokenizer, text, context, stride)
    ]
    if not windows:
        raise DataError("no text with at least two tokens to evaluate on")
    losses = _losses(model, windows)
    sizes = [len(text.encode()) for text in documents]
    counted = [float(window.num_counted) for window in windows]
    num_bytes = [window.share * sizes[window.document] for window in windows]
    parts = np.array([losses, counted, num_bytes]).T  # [windows, 3]
    by_document = _sum_by([window.document for window in windows], parts)
    units = by_document if len(by_document) > 1 else parts
    return TextFigures(
        loss=bootstrap(units, _loss, seed=seed),
        perplexity=bootstrap(units, lambda sums: math.exp(_loss(sums)), seed=seed),
        bits_per_byte=bootstrap(units, _bits_per_byte, seed=seed),
        num_documents=len(by_document),
        num_tokens=int(parts[:, 1].sum()),
        num_bytes=round(parts[:, 2].sum()),
    )


def _loss(sums: npt.NDArray[np.float64]) -> float:
    return float(sums[0] / sums[1])


def _bits_per_byte(sums: npt.NDArray[np.float64]) -> float:
    return float(sums[0] / math.log(2) / sums[2])


def _windows(
    index: int, tokenizer: Tokenizer, text: str, context: int, stride: int
) -> Iterator[_Window]:
    ids = tokenizer.encode(text)
    special = tokenizer.special_ids
    widths = [0 if token in special else len(tokenizer.token_bytes(token)) for token in ids]
    total = sum(widths[1:]) or 1
    for start in range(1, len(ids), stride):
        end = min(start + stride, len(ids))
        begin = max(0, end - 1 - context)
        yield _Window(index, ids[begin:end], end - start, sum(widths[start:end]) / total)


def _losses(model: Transformer, windows: Sequence[_Window]) -> list[float]:
    """Sum of the losses that count in each window, in nats."""
    model.eval()
    losses: list[float] = []
    for start in range(0, len(windows), _WINDOWS_AT_ONCE):
        part = windows[start : start + _WINDOWS_AT_ONCE]
        width = max(len(window.ids) for window in part) - 1
        inputs = torch.zeros((len(part), width), dtype=torch.int64)
        targets = torch.full((len(part), width), IGNORED, dtype=torch.int64)
        for row, window in enumerate(part):
            length = len(window.ids) - 1
            inputs[row, :length] = torch.tensor(window.ids[:-1])
            counted = slice(length - window.num_counted, length)
            targets[row, counted] = torch.tensor(window.ids[1:])[counted]
        with torch.no_grad():
            logits = model(inputs)
        each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        losses += each.view(targets.shape).double().sum(dim=1).tolist()
    return losses


def _sum_by(keys: Sequence[int], parts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Rows of `parts` with equal keys added up, by ascending key."""
    _, places = np.unique(keys, return_inverse=True)
    sums = np.zeros((places.max() + 1, parts.shape[1]))
    np.add.at(sums, places, parts)
    return sums
