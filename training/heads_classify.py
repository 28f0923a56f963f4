"""Classification: a label for a text, from the hidden state of its last token.

Shapes: B rows, T tokens, L labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmserve.config import Head
from llmserve.errors import DataError
from llmserve.text.tokenizer import Tokenizer

from .eval_scores import accuracy, confusion, f1_scores, macro_f1
from .finetune_examples import Example, Lengths, TokenRow
from .finetune_model import TunedModel
from .finetune_rows import Row
from .finetune_task import Task, in_batches

__all__ = ["ClassifyExample", "ClassifyTask", "find_labels"]


@dataclass(frozen=True, slots=True)
class ClassifyExample(Example):
    """A text and its label's place among the labels."""

    label: int = 0


def find_labels(rows: Sequence[Row]) -> tuple[str, ...]:
    """The labels of the rows, in the order of their names.

    Raises `DataError` for a row without one, or fewer than two different ones.
    """
    labels = sorted({_label(row) for row in rows})
    if len(labels) < 2:
        raise DataError(f"every row has the label {labels[0]!r}; a classifier needs two or more")
    return tuple(labels)


def _label(row: Row) -> str:
    """Labels may be whole numbers in JSON; they are names here."""
    value = row.values.get("label")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return row.text("label")


class ClassifyTask(Task[ClassifyExample]):
    """Cross-entropy over the labels."""

    def __init__(self, tokenizer: Tokenizer, labels: Sequence[str]) -> None:
        """`labels` in the order of the head's scores."""
        self._tokenizer = tokenizer
        self._labels = tuple(labels)
        self._place_of = {label: index for index, label in enumerate(labels)}
        self.head = Head(kind="sequence", labels=self._labels)
        self.inputs = "\n".join(self._labels)

    def example(self, row: Row, lengths: Lengths) -> ClassifyExample | None:
        """The text, begun as the tokenizer begins a text."""
        label = _label(row)
        if label not in self._place_of:
            raise DataError(
                f"{row.place}: the label {label!r} is none of {', '.join(self._labels)}"
            )
        ids = TokenRow(tuple(self._tokenizer.encode(row.text("text"))))
        fitted = lengths.fit(ids, row.place)
        return None if fitted is None else ClassifyExample((fitted,), self._place_of[label])

    def loss(self, model: TunedModel, examples: Sequence[ClassifyExample]) -> Tensor:
        """Sum of the texts' losses, in nats."""
        wanted = torch.tensor([example.label for example in examples], device=model.device)
        return F.cross_entropy(self._scores(model, examples), wanted, reduction="sum")

    def figures(self, model: TunedModel, examples: Sequence[ClassifyExample]) -> dict[str, float]:
        """Accuracy, macro F1, and each label's F1."""
        wanted = [self._labels[example.label] for example in examples]
        sums = confusion(wanted, self.predict(model, examples), self._labels).sum(axis=0)
        each = zip(self._labels, f1_scores(sums).tolist(), strict=True)
        return {
            "accuracy": accuracy(sums),
            "macro_f1": macro_f1(sums),
            **{f"f1_{label}": value for label, value in each if math.isfinite(value)},
        }

    def predict(self, model: TunedModel, examples: Sequence[ClassifyExample]) -> list[str]:
        """The likeliest label of each text."""

        def compute(batch: list[ClassifyExample]) -> list[int]:
            places: list[int] = self._scores(model, batch).argmax(-1).tolist()
            return places

        return [self._labels[place] for place in in_batches(examples, compute)]

    def _scores(self, model: TunedModel, examples: Sequence[ClassifyExample]) -> Tensor:
        """[B, L]."""
        ids, _, last = model.fill_up([example.rows[0] for example in examples])
        return model.last_scores(ids, last)
