"""Reward: a number for an answer, higher for the better of two (Bradley-Terry).

The loss of a pair is `-log sigmoid(r(chosen) - r(rejected))` (arXiv 2203.02155, section 3.5); the
number is the head's one score at the last token of prompt and answer together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llmserve.config import Head

from .finetune_chats import ChatEncoder
from .finetune_examples import Example, Lengths, TokenRow
from .finetune_model import TunedModel
from .finetune_rows import Row
from .finetune_task import Task, in_batches
from .preference_rows import encode_pair

__all__ = ["RewardTask"]


class RewardTask(Task[Example]):
    """Rows {"prompt", "chosen", "rejected"}."""

    def __init__(self, encoder: ChatEncoder) -> None:
        self._encoder = encoder
        self.inputs = encoder.source
        self.head = Head(kind="sequence", labels=("reward",))

    def example(self, row: Row, lengths: Lengths) -> Example | None:
        """Chosen and rejected conversation."""
        pair = encode_pair(self._encoder, row, lengths)
        return None if pair is None else Example(tuple(TokenRow(text.ids) for text in pair))

    def loss(self, model: TunedModel, examples: Sequence[Example]) -> Tensor:
        """Sum over the pairs, in nats."""
        return -F.logsigmoid(self._margins(model, examples)).sum()

    def figures(self, model: TunedModel, examples: Sequence[Example]) -> dict[str, float]:
        """How often the chosen answer has the higher reward, and by how much."""
        margins = torch.stack(in_batches(examples, lambda batch: list(self._margins(model, batch))))
        return {
            "accuracy": float((margins > 0).float().mean()),
            "reward_margin": float(margins.mean()),
        }

    def special_files(self) -> dict[str, bytes]:
        """The template that made the texts."""
        return {"chat_template.jinja": self._encoder.source.encode()}

    def _margins(self, model: TunedModel, examples: Sequence[Example]) -> Tensor:
        """r(chosen) - r(rejected), [B]."""
        texts = [example.rows[place] for place in (0, 1) for example in examples]
        ids, _, last = model.fill_up(texts)
        chosen, rejected = model.last_scores(ids, last)[:, 0].chunk(2)
        return chosen - rejected
