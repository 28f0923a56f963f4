"""Steps of fine-tuning: parts add up to the batch, and only what may change does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from llmserve.training.finetune_examples import Example, RowOrder
from llmserve.training.finetune_language import LanguageTask
from llmserve.training.finetune_trainer import FinetuneTrainer
from support.finetuning import tiny_finetune_recipe
from support.tuned import log_likelihood_alone, make_tuned, random_examples


class Answers(LanguageTask):
    """Rows that are there already."""

    def example(self, row: Any, lengths: Any) -> Example | None:
        """Not needed."""
        raise NotImplementedError


def make_trainer(
    *, lora: Sequence[str] = (), threads: int = 1, precision: Any = "float32", **changes: Any
) -> FinetuneTrainer:
    recipe = tiny_finetune_recipe(method="lora" if lora else "full", **changes)
    tuned = make_tuned(lora=lora)
    return FinetuneTrainer(
        tuned, Answers(), random_examples(24), recipe, precision=precision, threads=threads
    )


def weights(trainer: FinetuneTrainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.trainable.values()])


def run(trainer: FinetuneTrainer, steps: int) -> list[float]:
    return [trainer.run_step().loss for _ in range(steps)]


def test_the_loss_is_the_mean_over_all_targets_of_the_step() -> None:
    trainer = make_trainer(batch_size=6, accumulation=3, seed=5)
    examples = random_examples(24)
    order = RowOrder([example.length for example in examples], batch_size=2, seed=5)
    rows = [examples[i].rows[0] for position in range(3) for i in order.batch(position)]
    total = -sum(log_likelihood_alone(trainer.tuned, row) for row in rows)
    expected = total / sum(row.num_targets for row in rows)
    assert trainer.run_step().loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("lora", [(), ("q_proj", "down_proj")], ids=["full", "lora"])
def test_parts_of_a_batch_with_answers_of_unequal_length_equal_the_whole(
    lora: Sequence[str],
) -> None:
    # One pass in one batch: the parts differ, the rows and their sum do not.
    whole = make_trainer(lora=lora, batch_size=24, accumulation=1, learning_rate=1e-3)
    parts = make_trainer(lora=lora, batch_size=24, accumulation=6, learning_rate=1e-3)
    assert run(whole, 3) == pytest.approx(run(parts, 3), rel=1e-5)
    # Adam divides by the gradient's size: where that is tiny, rounding shows.
    torch.testing.assert_close(weights(parts), weights(whole), atol=2e-5, rtol=1e-4)


def test_threads_share_the_batch() -> None:
    alone, shared, again = (make_trainer(threads=count) for count in (1, 2, 2))
    losses = run(alone, 4)
    assert run(shared, 4) == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(weights(shared), weights(alone), atol=2e-5, rtol=1e-4)
    run(again, 4)
    assert torch.equal(weights(again), weights(shared))


def test_lora_leaves_the_base_alone_and_learns() -> None:
    trainer = make_trainer(lora=("q_proj", "v_proj"), steps=30, batch_size=24, accumulation=1)
    before = {name: p.detach().clone() for name, p in trainer.tuned.model.named_parameters()}
    losses = run(trainer, 30)
    assert losses[-1] < 0.95 * losses[0]
    for name, parameter in trainer.tuned.model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_bfloat16_learns_like_float32() -> None:
    settings: dict[str, Any] = {"learning_rate": 1e-3, "lora": ("q_proj", "gate_proj")}
    exact = run(make_trainer(**settings), 8)
    assert run(make_trainer(precision="bfloat16", **settings), 8) == pytest.approx(exact, rel=0.03)


def test_held_out_loss_is_that_of_rows_alone() -> None:
    trainer, examples = make_trainer(), random_examples(9)
    rows = [example.rows[0] for example in examples]
    expected = -sum(log_likelihood_alone(trainer.tuned, row) for row in rows)
    expected /= sum(row.num_targets for row in rows)
    assert trainer.held_out_loss(examples) == pytest.approx(expected, rel=1e-5)


def test_the_rate_rises_and_falls_to_a_tenth() -> None:
    trainer = make_trainer(steps=20, warmup=0.25, learning_rate=1e-3)
    rates = [trainer.run_step().learning_rate for _ in range(20)]
    assert rates[:5] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3])
    assert rates[-1] == pytest.approx(1e-4)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_passes_become_steps() -> None:
    trainer = make_trainer(steps=None, epochs=2.5, batch_size=8, accumulation=2)
    assert trainer.steps_per_epoch == 3
    assert trainer.state.planned_steps == 8
