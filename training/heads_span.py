"""Question answering by span: which stretch of a text answers a question.

The model reads the question, a new line and the text, as the server puts them; its head gives every
token a score for being the answer's first and one for being its last (arXiv:1810.04805, section
4.2). The likeliest pair in the text, in the right order, is the answer.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmserve.config import Head
from llmserve.errors import DataError
from llmserve.text.tokenizer import Tokenizer

from .eval_scores import exact_match, token_f1
from .finetune_examples import Example, Lengths, TokenRow
from .finetune_model import TunedModel
from .finetune_rows import Row
from .finetune_task import Task, in_batches

__all__ = ["QUESTION_END", "SpanExample", "SpanTask", "best_span"]

QUESTION_END = "\n"
"""Between question and text."""

_MAX_ANSWER_TOKENS = 30
"""Longest answer that is looked for."""


@dataclass(frozen=True, slots=True)
class SpanExample(Example):
    """A question and its text, as one row of tokens."""

    start: int = -1
    """Place of the answer's first token; -1: the text was cut before the answer's end."""
    end: int = -1
    """Place of its last token."""
    first: int = 0
    """Place of the text's first token."""
    context: str = ""
    """The text."""
    offsets: tuple[tuple[int, int], ...] = ()
    """Characters of `context`, from and to, for each token from `first` on."""
    answers: tuple[str, ...] = ()
    """Every answer that counts as right."""


class SpanTask(Task[SpanExample]):
    """Rows {"question", "context", "answers": [{"text", "answer_start"}, ...]}, as SQuAD's."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.head = Head(kind="span", labels=("start", "end"))

    def example(self, row: Row, lengths: Lengths) -> SpanExample | None:
        """Question and text, cut at the text's end. The first of several answers is learned."""
        question, context = row.text("question"), row.text("context")
        answers = _answers(row, context)
        before = self._tokenizer.encode(question + QUESTION_END)
        [(ids, offsets)] = self._tokenizer.encode_with_offsets([context], add_special_tokens=False)
        fitted = lengths.fit(TokenRow((*before, *ids)), row.place)
        if fitted is None:
            return None
        first = len(before)
        if first >= len(fitted.ids):
            raise DataError(f"{row.place}: the question leaves no room for its text")
        places = offsets[: len(fitted.ids) - first]
        start, end = _token_range(places, *answers[0])
        return SpanExample(
            (fitted,),
            start=-1 if start is None or end is None else first + start,
            end=-1 if start is None or end is None else first + end,
            first=first,
            context=context,
            offsets=tuple(places),
            answers=tuple(context[low:high] for low, high in answers),
        )

    def units(self, example: SpanExample) -> int:
        """None to learn from where the answer was cut off."""
        return int(example.start >= 0)

    def loss(self, model: TunedModel, examples: Sequence[SpanExample]) -> Tensor:
        """Sum over the questions of the mean loss of first and last token, in nats."""
        learned = [example for example in examples if example.start >= 0]
        if not learned:
            return torch.zeros((), device=model.device)
        scores = self._scores(model, learned)  # [B, 2, T]
        wanted = torch.tensor([[e.start, e.end] for e in learned], device=model.device)
        return F.cross_entropy(scores.flatten(0, 1), wanted.flatten(), reduction="sum") / 2

    def figures(self, model: TunedModel, examples: Sequence[SpanExample]) -> dict[str, float]:
        """Exact match and token F1, over all questions."""
        found = self.predict(model, examples)
        pairs = list(zip(found, (example.answers for example in examples), strict=True))
        return {
            "exact_match": sum(exact_match(*pair) for pair in pairs) / len(pairs),
            "token_f1": sum(token_f1(*pair) for pair in pairs) / len(pairs),
        }

    def predict(self, model: TunedModel, examples: Sequence[SpanExample]) -> list[str]:
        """The likeliest answer to each question."""

        def compute(batch: list[SpanExample]) -> list[str]:
            scores = self._scores(model, batch).cpu()
            return [best_span(example, row) for example, row in zip(batch, scores, strict=True)]

        return in_batches(examples, compute)

    def _scores(self, model: TunedModel, examples: Sequence[SpanExample]) -> Tensor:
        """[B, 2, T], minus infinity outside the text."""
        ids, _, last = model.fill_up([example.rows[0] for example in examples])
        places = torch.arange(ids.shape[1], device=ids.device)
        first = torch.tensor([example.first for example in examples], device=ids.device)
        outside = (places < first[:, None]) | (places > last[:, None])
        return model.scores(ids).mT.masked_fill(outside[:, None], float("-inf"))


def _answers(row: Row, context: str) -> list[tuple[int, int]]:
    """Characters from and to of every answer."""
    values = row.values.get("answers")
    if isinstance(values, str):  # a table holds one answer, wherever it stands first
        values = [{"text": values, "answer_start": context.find(values)}]
    if not isinstance(values, list) or not values:
        raise DataError(f"{row.place}: has no answers; each question needs one in its text")
    return [_answer(row, value, context) for value in values]


def _answer(row: Row, value: Any, context: str) -> tuple[int, int]:
    text = value.get("text") if isinstance(value, dict) else None
    start = value.get("answer_start") if isinstance(value, dict) else None
    if isinstance(text, str) and isinstance(start, int) and text.strip():
        end = start + len(text)
        if start >= 0 and context[start:end] == text:
            return start, end
    raise DataError(f"{row.place}: the answer {value!r:.80} does not stand in the text there")


def _token_range(
    places: Sequence[tuple[int, int]], low: int, high: int
) -> tuple[int | None, int | None]:
    """First and last token that reach into characters `low` to `high`; None: cut off."""
    inside = [i for i, (start, end) in enumerate(places) if start < high and low < end]
    is_whole = bool(inside) and places[inside[-1]][1] >= high
    return (inside[0], inside[-1]) if is_whole else (None, None)


def best_span(example: SpanExample, scores: Tensor) -> str:
    """The text between the likeliest pair of tokens [2, T], in order and not too far apart."""
    start, end = scores[:, example.first : len(example.rows[0].ids)]
    both = start[:, None] + end[None, :]
    allowed = torch.ones_like(both).triu().tril(_MAX_ANSWER_TOKENS - 1).bool()
    place = int(both.masked_fill(~allowed, float("-inf")).argmax())
    low, high = divmod(place, len(end))
    return example.context[example.offsets[low][0] : example.offsets[high][1]].strip()
