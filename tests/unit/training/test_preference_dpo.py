"""Direct preference optimization against its equation, row by row."""

from __future__ import annotations

import math

import pytest
import torch

from llmserve.errors import DataError
from llmserve.text.tokenizer import Tokenizer
from llmserve.training.finetune_chats import ChatEncoder
from llmserve.training.finetune_examples import Lengths
from llmserve.training.finetune_rows import Row
from llmserve.training.preference_dpo import DpoTask, PairExample
from support.models import TEXT
from support.tuned import log_likelihood_alone, make_tuned, random_examples


def test_the_loss_is_the_equation() -> None:
    task = DpoTask.__new__(DpoTask)
    task._beta = 0.3
    pairs = [PairExample(example.rows) for example in random_examples(7, rows=2)]
    reference = make_tuned()
    prepared = task.prepare(reference, pairs)
    policy = make_tuned(lora=("q_proj", "up_proj"))
    expected, wins = 0.0, 0
    for pair in pairs:
        gains = [
            log_likelihood_alone(policy, row) - log_likelihood_alone(reference, row)
            for row in pair.rows
        ]
        margin = 0.3 * (gains[0] - gains[1])
        expected += math.log1p(math.exp(-margin))
        wins += margin > 0
    with torch.no_grad():
        assert float(task.loss(policy, prepared)) == pytest.approx(expected, rel=1e-4)
        assert task.figures(policy, prepared)["accuracy"] == pytest.approx(wins / 7)
        at_first = task.loss(reference, prepared)
    assert float(at_first) == pytest.approx(7 * math.log(2), rel=1e-5)


def test_the_answers_alone_are_compared() -> None:
    tokenizer = Tokenizer.train("bpe", [TEXT] * 4, vocab_size=300)
    task = DpoTask(ChatEncoder(tokenizer), beta=0.1)
    lengths = Lengths(128, "truncate")
    earlier = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    values = {"prompt": earlier, "chosen": "four", "rejected": [{"content": "five"}]}
    example = task.example(Row("p", values), lengths)
    assert example is not None
    for row, answer in zip(example.rows, ("four", "five"), strict=True):
        targets = [target for target in row.targets if target >= 0]
        assert tokenizer.decode(targets) == answer
    same_start = {"prompt": "a", "chosen": "x" * 200 + "a", "rejected": "x" * 200 + "b"}
    assert task.example(Row("p", same_start), lengths) is None  # they differ behind the cut
    assert lengths.num_dropped == 1
    with pytest.raises(DataError, match="p: the field 'rejected' must hold an answer"):
        task.example(Row("p", {"prompt": "a", "chosen": "b", "rejected": " "}), lengths)
