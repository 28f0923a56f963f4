"""Tasks that train the output layer as pre-training does: documents, and answers in chats.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from llmserve.text.tokenizer import Tokenizer

from .batches import IGNORED
from .finetune_chats import ChatEncoder, read_chat
from .finetune_examples import Example, Lengths, TokenRow
from .finetune_model import TunedModel
from .finetune_rows import Row
from .finetune_task import Task, in_batches, log_likelihood

__all__ = ["ChatTask", "LanguageTask", "TextTask"]


class LanguageTask(Task[Example]):
    """Cross-entropy of the rows' targets; units are tokens to be predicted."""

    def units(self, example: Example) -> int:
        """Tokens to be predicted."""
        return example.rows[0].num_targets

    def loss(self, model: TunedModel, examples: Sequence[Example]) -> Tensor:
        """Sum of the tokens' losses, in nats."""
        ids, targets, _ = model.fill_up([example.rows[0] for example in examples])
        logits = model.logits(ids).float()
        return F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED
        )

    def figures(self, model: TunedModel, examples: Sequence[Example]) -> dict[str, float]:
        """Perplexity of the tokens to be predicted."""

        def compute(batch: list[Example]) -> list[float]:
            ids, targets, _ = model.fill_up([example.rows[0] for example in batch])
            found: list[float] = log_likelihood(model.logits(ids), targets).tolist()
            return found

        loss = -sum(in_batches(examples, compute)) / sum(map(self.units, examples))
        return {"perplexity": math.exp(loss)}


class TextTask(LanguageTask):
    """Documents: {"text": ...}, every token predicted, an end id after the last."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def example(self, row: Row, lengths: Lengths) -> Example | None:
        """The document, begun as the tokenizer begins a text."""
        ids = self._tokenizer.encode(row.text("text"))
        if self._tokenizer.eos_token_id is not None:
            ids.append(self._tokenizer.eos_token_id)
        fitted = lengths.fit(TokenRow.predicting(ids, [True] * len(ids)), row.place)
        return None if fitted is None else Example((fitted,))


class ChatTask(LanguageTask):
    """Conversations, of which the assistant's words alone are predicted."""

    def __init__(self, encoder: ChatEncoder) -> None:
        self._encoder = encoder
        self.inputs = encoder.source
        self._end_ids: set[int] = set()

    def example(self, row: Row, lengths: Lengths) -> Example | None:
        """The conversation in the model's template."""
        encoded = self._encoder.encode(read_chat(row), row.place)
        end_id = self._encoder.end_id(encoded)
        if end_id is not None:
            self._end_ids.add(end_id)
        fitted = lengths.fit(encoded, row.place)
        return None if fitted is None else Example((fitted,))

    def special_files(self) -> dict[str, bytes]:
        """The chat template that the model was tuned with."""
        return {"chat_template.jinja": self._encoder.source.encode()}

    def end_ids(self) -> tuple[int, ...]:
        """What ends answers in this template."""
        return tuple(sorted(self._end_ids))
