"""Distillation: a smaller model learns a larger one's distribution over every next token.

The loss of a token is `(1 - c) · τ² · KL(teacher || student)` at temperature τ, plus `c` times the
cross-entropy with the text itself (Hinton et al., arXiv 1503.02531, section 2). Both models must
have the same tokenizer: their distributions are over the same ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llmserve.checkpoint import Checkpoint
from llmserve.errors import ConfigError
from llmserve.model.transformer import Transformer
from llmserve.model.weights import load_model
from llmserve.text.tokenizer import Tokenizer

from .batches import IGNORED
from .finetune_examples import Example, Lengths
from .finetune_language import ChatTask, LanguageTask, TextTask
from .finetune_model import TunedModel
from .finetune_rows import Row
from .finetune_task import in_batches
from .prepare import tokenizer_sha256

__all__ = ["DistillTask", "Teacher", "load_teacher"]


@dataclass(frozen=True, slots=True)
class Teacher:
    """The larger model."""

    model: Transformer
    """Frozen."""
    fingerprint: str
    """Of its folder."""


def load_teacher(folder: Path, tokenizer: Tokenizer, device: torch.device | str = "cpu") -> Teacher:
    """The larger model in a folder, on the device of the smaller one.

    Raises:
        CheckpointError: the folder cannot be used.
        ConfigError: its tokenizer is another than the student's, or it gives no logits.
    """
    checkpoint = Checkpoint.open(folder)
    if checkpoint.config.head is not None:
        raise ConfigError(f"teacher {folder}: has a head in place of an output layer")
    theirs = Tokenizer.load(folder)
    if theirs.files()["tokenizer.json"] != tokenizer.files()["tokenizer.json"]:
        raise ConfigError(
            f"teacher {folder}: has another tokenizer ({tokenizer_sha256(theirs)[:12]}) than the "
            f"student ({tokenizer_sha256(tokenizer)[:12]}); their tokens cannot be compared"
        )
    model = load_model(checkpoint, dtype=torch.float32, device=device).requires_grad_(False)
    return Teacher(model, checkpoint.fingerprint)


class DistillTask(LanguageTask):
    """Documents or chats, with a teacher's distribution for every target."""

    def __init__(
        self,
        teacher: Teacher,
        text: TextTask,
        chat: ChatTask,
        *,
        temperature: float,
        cross_entropy: float,
    ) -> None:
        """`cross_entropy` is the share of the loss that the text itself has; 0..1."""
        self._teacher, self._text, self._chat = teacher.model, text, chat
        self.inputs = f"{teacher.fingerprint}\n{chat.inputs}"
        self._temperature, self._share = temperature, cross_entropy

    def example(self, row: Row, lengths: Lengths) -> Example | None:
        """A document where the row has a field `text`, else a conversation."""
        return (self._text if "text" in row.values else self._chat).example(row, lengths)

    def loss(self, model: TunedModel, examples: Sequence[Example]) -> Tensor:
        """Sum over targets, in nats."""
        student, teacher, targets = self._both(model, examples)
        divergence = _divergence(teacher / self._temperature, student / self._temperature)
        return self._share * F.cross_entropy(student, targets, reduction="sum") + (
            (1 - self._share) * self._temperature**2 * divergence.sum()
        )

    def figures(self, model: TunedModel, examples: Sequence[Example]) -> dict[str, float]:
        """Mean cross-entropy, KL at temperature 1, and how often the likeliest id is the same."""

        def compute(batch: list[Example]) -> list[Tensor]:
            parts = []
            for example in batch:
                student, teacher, targets = self._both(model, [example])
                agree = (student.argmax(-1) == teacher.argmax(-1)).sum()
                loss = F.cross_entropy(student, targets, reduction="sum")
                parts.append(torch.stack([loss, _divergence(teacher, student).sum(), agree]))
            return parts

        sums = torch.stack(in_batches(examples, compute)).sum(dim=0)
        loss, divergence, agreement = (sums / sum(map(self.units, examples))).tolist()
        return {"cross_entropy": loss, "kl": divergence, "top1_agreement": agreement}

    def special_files(self) -> dict[str, bytes]:
        """The chat template, where there were conversations."""
        return self._chat.special_files() if self._chat.end_ids() else {}

    def end_ids(self) -> tuple[int, ...]:
        """As the conversations end."""
        return self._chat.end_ids()

    def _both(
        self, model: TunedModel, examples: Sequence[Example]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Float32 logits of student and teacher [N, V] at the N targets, and the targets [N]."""
        ids, targets, _ = model.fill_up([example.rows[0] for example in examples])
        wanted = targets != IGNORED
        with torch.no_grad():
            teacher = self._teacher(ids)[wanted].float()
        student = model.logits(ids)[wanted].float()
        width = min(student.shape[-1], teacher.shape[-1])  # rows beyond the vocabulary differ
        return student[:, :width], teacher[:, :width], targets[wanted]


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of logits [N, V] → [N, V] terms, which sum to it."""
    log_student, log_teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    return F.kl_div(log_student, log_teacher, reduction="none", log_target=True)
