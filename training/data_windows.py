"""A run's texts as windows, in the way its recipe asks for: to train on, and to evaluate."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from llmserve.model.transformer import Transformer

from .attention import PackedAttention
from .batches import IGNORED, StreamWindows, TokenIds, Windows
from .data_packing import PackedWindows
from .devices import beside
from .evaluation import LossSum, held_out_loss, windows_at_once
from .recipe import TrainingRecipe
from .token_file import TokenFile

__all__ = ["describe_windows", "evaluate_text", "open_windows"]


def open_windows(text: TokenFile, recipe: TrainingRecipe, *, end_id: int | None) -> Windows:
    """The windows to train on; `end_id` ends a document.

    Raises:
        DataError: too little text for one window.
    """
    context, seed = recipe.max_seq_len, recipe.seed
    if recipe.packing == "stream":
        return StreamWindows(text.ids, context=context, seed=seed)
    return PackedWindows(text.ids, text.document_starts, context=context, seed=seed, end_id=end_id)


def describe_windows(windows: Windows) -> str:
    """One line about how the text fills its windows."""
    if not isinstance(windows, PackedWindows):
        return f"{windows.windows_per_epoch:,} windows in a pass, cut wherever they end"
    packing = windows.packing
    return (
        f"{windows.windows_per_epoch:,} windows in a pass, packed with {len(packing.starts):,} "
        f"documents and pieces of documents; {packing.wasted_share:.2%} of the places unused"
    )


def evaluate_text(
    model: Transformer,
    text: TokenFile,
    recipe: TrainingRecipe,
    *,
    end_id: int | None,
    max_tokens: int | None = None,
    loss_sum: LossSum | None = None,
) -> tuple[float, int]:
    """Mean nats for each predicted token of `text`, and how many were predicted.

    Args:
        model: Left in the mode it was in.
        text: Read from its beginning on.
        recipe: Says the context, and whether a document sees the one before it.
        end_id: What is to be predicted at a document's end.
        max_tokens: Most tokens of the text; packed, of its whole documents; None: all.
        loss_sum: As for `evaluation.held_out_loss`.
    """
    if recipe.packing == "stream":
        ids: TokenIds = text.ids if max_tokens is None else text.ids[: max_tokens + 1]
        return (
            held_out_loss(model, ids, context=recipe.max_seq_len, loss_sum=loss_sum),
            len(ids) - 1,
        )
    windows = _first_documents(text, recipe, end_id, max_tokens)
    was_training = model.training
    model.eval()
    count = windows.num_targets(0, windows.windows_per_epoch)
    total = sum(
        float((loss_sum or _plain_loss(model))(*windows.read(start, size)))
        for start, size in _batches(windows.windows_per_epoch, windows_at_once(recipe.max_seq_len))
    )
    model.train(was_training)
    return total / count, count


def _first_documents(
    text: TokenFile, recipe: TrainingRecipe, end_id: int | None, max_tokens: int | None
) -> PackedWindows:
    """Windows of the documents that end within `max_tokens`, of the first one at least."""
    ends = np.append(text.document_starts[1:], len(text.ids))
    limit = len(text.ids) if max_tokens is None else max(max_tokens, int(ends[0]))
    count = int(np.searchsorted(ends, limit, side="right"))
    return PackedWindows(
        text.ids[: int(ends[count - 1])],
        text.document_starts[:count],
        context=recipe.max_seq_len,
        seed=None,
        end_id=end_id,
    )


def _batches(num_windows: int, most: int) -> list[tuple[int, int]]:
    """Position and size of each batch of all windows, `most` windows in one."""
    starts = range(0, num_windows, most)
    return [(start, min(most, num_windows - start)) for start in starts]


def _plain_loss(model: Transformer) -> LossSum:
    """The sum of a packed batch's losses, in float32 and without gradients."""

    def loss_sum(*batch: torch.Tensor) -> torch.Tensor:
        inputs, targets, positions = beside(model, *batch)
        with torch.no_grad():
            logits = model(inputs, PackedAttention(model.config, positions), positions)
        return functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED
        )

    return loss_sum
