"""Distillation against its definition, token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmserve.errors import ConfigError
from llmserve.text.tokenizer import Tokenizer
from llmserve.training.batches import IGNORED
from llmserve.training.distill_task import DistillTask, Teacher, load_teacher
from llmserve.training.finetune_chats import ChatEncoder
from llmserve.training.finetune_examples import Lengths
from llmserve.training.finetune_language import ChatTask, TextTask
from llmserve.training.finetune_rows import Row
from support.models import TEXT, make_model_folder
from support.tuned import make_tuned, random_examples


def make_task(tokenizer: Tokenizer, **settings: float) -> DistillTask:
    teacher = make_tuned().model
    with torch.no_grad():
        teacher.layers[0].mlp.down_proj.weight.neg_()
    return DistillTask(
        Teacher(teacher, "t"), TextTask(tokenizer), ChatTask(ChatEncoder(tokenizer)), **settings
    )


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train("bpe", [TEXT] * 4, vocab_size=300)


def test_the_loss_is_the_definition(tokenizer: Tokenizer) -> None:
    task = make_task(tokenizer, temperature=3.0, cross_entropy=0.25)
    student, examples = make_tuned(), random_examples(6)
    expected = kl_sum = same = 0.0
    for example in examples:
        ids = torch.tensor([example.rows[0].ids])
        with torch.no_grad():
            ours, theirs = student.logits(ids)[0].double(), task._teacher(ids)[0].double()
        for place, target in enumerate(example.rows[0].targets):
            if target == IGNORED:
                continue
            p, q = (theirs[place] / 3.0).softmax(-1), (ours[place] / 3.0).softmax(-1)
            divergence = float((p * (p / q).log()).sum())
            expected += 0.75 * 9.0 * divergence - 0.25 * float(ours[place].log_softmax(-1)[target])
            p, q = theirs[place].softmax(-1), ours[place].softmax(-1)
            kl_sum += float((p * (p / q).log()).sum())
            same += float(ours[place].argmax() == theirs[place].argmax())
    count = sum(map(task.units, examples))
    with torch.no_grad():
        assert float(task.loss(student, examples)) == pytest.approx(expected, rel=1e-4)
        figures = task.figures(student, examples)
    assert figures["kl"] == pytest.approx(kl_sum / count, rel=1e-3)
    assert figures["top1_agreement"] == pytest.approx(same / count)


def test_rows_are_documents_or_conversations(tokenizer: Tokenizer) -> None:
    task = make_task(tokenizer, temperature=1.0, cross_entropy=0.0)
    lengths = Lengths(64, "truncate")
    document = task.example(Row("p", {"text": "a dog"}), lengths)
    chat = task.example(Row("p", {"prompt": "a", "response": "dog"}), lengths)
    assert document is not None
    assert chat is not None
    assert document.rows[0].num_targets == len(document.rows[0].ids) - 1
    assert chat.rows[0].num_targets < len(chat.rows[0].ids) - 1
    assert task.end_ids() == (0,)


def test_another_tokenizer_or_a_head_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = make_model_folder(tmp_path / "m")
    with pytest.raises(ConfigError, match="has another tokenizer"):
        load_teacher(folder, tokenizer)
    assert not any(
        p.requires_grad for p in load_teacher(folder, Tokenizer.load(folder)).model.parameters()
    )
