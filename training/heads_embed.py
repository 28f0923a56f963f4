"""Embeddings: texts that belong together get vectors that point the same way.

A text's vector is the mean of its tokens' final hidden states, scaled to length 1, as `LLM.embed`
gives it unless told otherwise. Each query is compared with the positives of its whole batch, and
with every given negative; its own must win (InfoNCE, arXiv 1807.03748, with in-batch negatives).
Equal texts are not held against each other.

Shapes: B queries, N candidates, E hidden_size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llmserve.config import Head
from llmserve.text.tokenizer import Tokenizer

from .finetune_examples import Example, Lengths, TokenRow
from .finetune_model import TunedModel
from .finetune_rows import Row
from .finetune_task import Task, in_batches

__all__ = ["EmbedTask"]


class EmbedTask(Task[Example]):
    """Rows {"query", "positive"} and, where they have one, "negative"."""

    mixes_rows = True

    def __init__(self, tokenizer: Tokenizer, *, temperature: float) -> None:
        """Divide similarities, -1..1, by `temperature`."""
        self._tokenizer, self._temperature = tokenizer, temperature
        self.head = Head(kind="embedding")

    def example(self, row: Row, lengths: Lengths) -> Example | None:
        """Query, positive and, perhaps, negative."""
        names = ["query", "positive", *(["negative"] if "negative" in row.values else [])]
        fitted = [
            lengths.fit(TokenRow(tuple(self._tokenizer.encode(row.text(name)))), row.place)
            for name in names
        ]
        kept = tuple(text for text in fitted if text is not None)
        return Example(kept) if len(kept) == len(names) else None

    def loss(self, model: TunedModel, examples: Sequence[Example]) -> Tensor:
        """Sum over the queries, in nats."""
        texts = [example.rows[1] for example in examples]
        texts += [row for example in examples for row in example.rows[2:]]
        queries = self._vectors(model, [example.rows[0] for example in examples])
        similarities = queries @ self._vectors(model, texts).T / self._temperature  # [B, N]
        own = torch.arange(len(examples), device=model.device)
        twins = torch.tensor(
            [
                [j != i and texts[j].ids == texts[i].ids for j in range(len(texts))]
                for i in range(len(examples))
            ],
            device=model.device,
        )
        similarities = similarities.masked_fill(twins, float("-inf"))
        return F.cross_entropy(similarities, own, reduction="sum")

    def figures(self, model: TunedModel, examples: Sequence[Example]) -> dict[str, float]:
        """How often the own positive is nearest among all, and its mean reciprocal rank."""

        def embed(place: int) -> Tensor:
            def compute(batch: list[Example]) -> list[Tensor]:
                return list(self._vectors(model, [example.rows[place] for example in batch]))

            return torch.stack(in_batches(examples, compute))

        similarities = embed(0) @ embed(1).T
        ranks = (similarities > similarities.diagonal()[:, None]).sum(dim=1) + 1
        return {
            "recall_at_1": float((ranks == 1).float().mean()),
            "mean_reciprocal_rank": float((1.0 / ranks).mean()),
        }

    def _vectors(self, model: TunedModel, rows: Sequence[TokenRow]) -> Tensor:
        """[B, E], of length 1."""
        ids, _, last = model.fill_up(rows)
        states = model.scores(ids)
        is_text = torch.arange(ids.shape[1], device=ids.device) <= last[:, None]
        return F.normalize((states * is_text[..., None]).sum(dim=1), dim=-1)
