"""Direct preference optimization: the model itself learns which of two answers is better.

The loss of a pair is `-log sigmoid(β (Δ(chosen) - Δ(rejected)))`, where Δ is by how much the model
makes an answer likelier, in nats, than the reference did (arXiv 2305.18290, equation 7). The
reference is the model before the first step: what it thinks of every answer is computed once, so
that no second model has to be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .finetune_chats import ChatEncoder
from .finetune_examples import Example, Lengths
from .finetune_model import TunedModel
from .finetune_rows import Row
from .finetune_task import Task, in_batches, log_likelihood
from .preference_rows import encode_pair

__all__ = ["DpoTask", "PairExample"]


@dataclass(frozen=True, slots=True)
class PairExample(Example):
    """Two answers to one prompt, and what the reference thinks of them."""

    reference: tuple[float, float] = (0.0, 0.0)
    """Log-probability of the chosen and the rejected answer, in nats."""


class DpoTask(Task[PairExample]):
    """Rows {"prompt", "chosen", "rejected"}."""

    def __init__(self, encoder: ChatEncoder, *, beta: float) -> None:
        """Hold the model to the reference by `beta`, above 0: the more, the closer."""
        self._encoder, self._beta = encoder, beta
        self.inputs = encoder.source

    def example(self, row: Row, lengths: Lengths) -> PairExample | None:
        """Chosen and rejected conversation."""
        pair = encode_pair(self._encoder, row, lengths)
        return None if pair is None else PairExample(pair)

    def prepare(self, model: TunedModel, examples: Sequence[PairExample]) -> list[PairExample]:
        """With what the model, as yet untrained, thinks of every answer."""

        def compute(batch: list[PairExample]) -> list[tuple[float, float]]:
            with torch.no_grad():
                chosen, rejected = self._likelihoods(model, batch).tolist()
            return list(zip(chosen, rejected, strict=True))

        references = in_batches(examples, compute)
        return [
            replace(example, reference=reference)
            for example, reference in zip(examples, references, strict=True)
        ]

    def loss(self, model: TunedModel, examples: Sequence[PairExample]) -> Tensor:
        """Sum over the pairs, in nats."""
        return -F.logsigmoid(self._margins(model, examples)).sum()

    def figures(self, model: TunedModel, examples: Sequence[PairExample]) -> dict[str, float]:
        """How often the chosen answer gained more than the rejected one, and by how much."""
        margins = torch.stack(in_batches(examples, lambda batch: list(self._margins(model, batch))))
        return {
            "accuracy": float((margins > 0).float().mean()),
            "reward_margin": float(margins.mean()),
        }

    def special_files(self) -> dict[str, bytes]:
        """The chat template that the model was tuned with."""
        return {"chat_template.jinja": self._encoder.source.encode()}

    def _margins(self, model: TunedModel, examples: Sequence[PairExample]) -> Tensor:
        """β times by how much more the chosen answer gained, [B]."""
        references = [example.reference for example in examples]
        reference = torch.tensor(references, device=model.device).T  # [2, B]
        gains = self._likelihoods(model, examples) - reference
        return self._beta * (gains[0] - gains[1])

    def _likelihoods(self, model: TunedModel, examples: Sequence[PairExample]) -> Tensor:
        """Log-probabilities of the answers, chosen ones first: [2, B]."""
        texts = [example.rows[place] for place in (0, 1) for example in examples]
        ids, targets, _ = model.fill_up(texts)
        return log_likelihood(model.logits(ids).float(), targets).view(2, -1)
