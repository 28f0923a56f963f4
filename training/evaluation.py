"""How well a model predicts text that it was not trained on, beside what guessing would give.

Perplexity depends on the tokenizer: fewer, longer tokens are each harder to guess. Bits per byte
does not, and compares any two models on the same text. A unigram model, which knows how often each
token occurs and nothing of what came before, is the floor that a model must beat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from llmserve.model.transformer import Transformer

from .batches import TokenIds
from .devices import beside

__all__ = ["HeldOutFigures", "LossSum", "held_out_loss", "unigram_loss", "windows_at_once"]

_TOKENS_AT_ONCE = 2048
"""Of several windows that are evaluated together: enough for full speed on a few cores."""

_IDS_AT_ONCE = 1 << 22

LossSum = Callable[..., torch.Tensor]
"""From the tensors of a batch (`batches.Windows.read`) to the sum of its losses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutFigures:
    """Figures of one model on held-out text."""

    loss: float
    """Nats for each token."""
    unigram_loss: float
    """Nats for each of the same tokens under a unigram model of the training text."""
    num_tokens: int
    """Tokens predicted."""
    num_bytes: int
    """UTF-8 bytes of the text."""

    @property
    def perplexity(self) -> float:
        """Tokens that would be as hard to tell apart if all were equally likely."""
        return math.exp(self.loss)

    @property
    def unigram_perplexity(self) -> float:
        """Perplexity of the unigram model."""
        return math.exp(self.unigram_loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits that coding the text with the model would take, for each byte of it."""
        return self.loss * self.num_tokens / math.log(2) / self.num_bytes


def held_out_loss(
    model: Transformer, ids: TokenIds, *, context: int, loss_sum: LossSum | None = None
) -> float:
    """Mean nats for each of `ids` but the first, in windows of `context` that do not overlap.

    `loss_sum` maps inputs and targets [windows, tokens] to the sum of their losses; None: plain
    float32. Leaves the model in the mode it was in.
    """
    was_training = model.training
    model.eval()
    total = 0.0
    with torch.no_grad():
        for inputs, targets in _windows(ids, context):
            if loss_sum is None:
                inputs, targets = beside(model, inputs, targets)
                logits = model(inputs)
                part = functional.cross_entropy(
                    logits.flatten(0, 1), targets.flatten(), reduction="sum"
                )
            else:
                part = loss_sum(inputs, targets)
            total += float(part)
    model.train(was_training)
    return total / (len(ids) - 1)


def unigram_loss(train_ids: TokenIds, held_out_ids: TokenIds, vocab_size: int) -> float:
    """Mean nats of the same tokens under their frequencies in training, each counted once more."""
    counts = np.ones(vocab_size, dtype=np.int64)
    for part in _parts(train_ids, 0):
        counts += np.bincount(part, minlength=vocab_size)
    log_probabilities = np.log(counts / counts.sum())
    total = sum(float(log_probabilities[part].sum()) for part in _parts(held_out_ids, 1))
    return -total / (len(held_out_ids) - 1)


def _parts(ids: TokenIds, first: int) -> Iterator[npt.NDArray[Any]]:
    """The ids from `first` on, a part at a time: they may be mapped, and many."""
    for start in range(first, len(ids), _IDS_AT_ONCE):
        yield ids[start : start + _IDS_AT_ONCE]


def windows_at_once(context: int) -> int:
    """How many windows of `context` tokens are evaluated together."""
    return max(1, _TOKENS_AT_ONCE // context)


def _windows(ids: TokenIds, context: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets: batches of equal windows, then the shorter rest."""
    whole, most = (len(ids) - 1) // context, windows_at_once(context)
    for first in range(0, whole, most):
        last = min(first + most, whole)
        yield _pair(ids[first * context : last * context + 1], (last - first, context))
    rest = len(ids) - 1 - whole * context
    if rest:
        yield _pair(ids[whole * context :], (1, rest))


def _pair(ids: npt.NDArray[Any], shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.from_numpy(ids.astype(np.int64))
    return tokens[:-1].view(shape), tokens[1:].view(shape)
