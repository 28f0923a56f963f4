"""Optimizer steps: accumulation, learning, precision, dropout and what is not finite."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llmserve.errors import TrainingError
from llmserve.model.transformer import Transformer
from llmserve.training.batches import StreamWindows
from llmserve.training.trainer import Trainer
from support.training_runs import tiny_config, tiny_recipe

IDS = (np.arange(4000) * 7 % 97 % 50).astype(np.uint16)


def make_trainer(*, precision: Any = "float32", threads: int = 1, **changes: Any) -> Trainer:
    recipe = tiny_recipe(**changes)
    model = Transformer(tiny_config(), dropout=recipe.dropout)
    model.initialize(torch.Generator().manual_seed(recipe.seed))
    windows = StreamWindows(IDS, context=recipe.max_seq_len, seed=recipe.seed)
    return Trainer(model, recipe, windows, precision=precision, threads=threads)


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def run(trainer: Trainer, steps: int) -> list[float]:
    return [trainer.run_step().loss for _ in range(steps)]


def test_four_parts_of_eight_equal_one_batch_of_32() -> None:
    whole = make_trainer(batch_size=32, accumulation=1)
    parts = make_trainer(batch_size=32, accumulation=4)
    assert run(whole, 3) == pytest.approx(run(parts, 3), rel=1e-5)
    assert whole.state.position == parts.state.position == 96
    # Adam divides by the gradient's size: where that is tiny, rounding shows.
    torch.testing.assert_close(weights(parts), weights(whole), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_share_the_batch(threads: int) -> None:
    alone, shared, again = (make_trainer(threads=count) for count in (1, threads, threads))
    losses = run(alone, 4)
    assert run(shared, 4) == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(weights(shared), weights(alone), atol=2e-5, rtol=1e-4)
    run(again, 4)
    assert torch.equal(weights(again), weights(shared))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_evaluation_on_several_threads_is_that_on_one(precision: str) -> None:
    inputs, targets = torch.from_numpy(IDS[:321].astype(np.int64)).unfold(0, 2, 1).unbind(1)
    windows = inputs.view(-1, 16), targets.view(-1, 16)
    losses = [
        float(make_trainer(threads=threads, precision=precision).loss_sum(*windows))
        for threads in (1, 2)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_loss_falls() -> None:
    trainer = make_trainer(steps=40, learning_rate=0.02, accumulation=1)
    losses = run(trainer, 40)
    assert losses[0] == pytest.approx(np.log(300), rel=0.02)
    assert losses[-1] < 0.7 * losses[0]


def test_bfloat16_learns_like_float32() -> None:
    settings = {"steps": 12, "learning_rate": 0.01}
    exact = run(make_trainer(**settings), 12)
    rounded = run(make_trainer(precision="bfloat16", **settings), 12)
    assert rounded == pytest.approx(exact, rel=0.03)


def test_same_seed_gives_the_same_weights_and_another_does_not() -> None:
    first, second, other = (make_trainer(seed=seed) for seed in (0, 0, 1))
    for trainer in (first, second, other):
        run(trainer, 3)
    assert torch.equal(weights(first), weights(second))
    assert not torch.equal(weights(first), weights(other))


def test_dropout_follows_from_seed_and_position() -> None:
    first, second = make_trainer(dropout=0.3), make_trainer(dropout=0.3)
    run(first, 3)
    torch.manual_seed(1234)  # whatever else drew from the global generator
    run(second, 3)
    assert torch.equal(weights(first), weights(second))
    without = make_trainer(dropout=0.0)
    run(without, 3)
    assert not torch.equal(weights(first), weights(without))


def test_gradient_is_clipped() -> None:
    trainer = make_trainer(clip_norm=1e-3)
    norms = []
    step = trainer.optimizer.step

    def spy() -> None:
        gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        norms.append(float(torch.cat(gradients).norm()))
        step()

    trainer.optimizer.step = spy  # type: ignore[method-assign, assignment]
    result = trainer.run_step()
    assert result.grad_norm > 1e-2
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


def make_loss_not_finite(trainer: Trainer, bad_parts: set[int], value: float) -> None:
    """Multiply the losses of those micro-batches, counted from 0, by `value`."""
    plain, calls = trainer.part_loss, iter(range(10**6))

    def broken(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = plain(inputs, targets)
        return loss * value if next(calls) in bad_parts else loss

    trainer.part_loss = broken  # type: ignore[method-assign]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_step_that_is_not_finite_changes_nothing(value: float) -> None:
    trainer = make_trainer()
    run(trainer, 2)
    before = weights(trainer)
    make_loss_not_finite(trainer, {1}, value)
    assert trainer.run_step().is_skipped
    assert torch.equal(weights(trainer), before)
    assert trainer.state.step == 3
    assert not trainer.run_step().is_skipped
    assert not torch.equal(weights(trainer), before)
    assert trainer.weights_are_finite()


def test_too_many_skipped_steps_end_the_run() -> None:
    trainer = make_trainer(max_skipped_steps=2)
    make_loss_not_finite(trainer, set(range(100)), float("nan"))
    trainer.run_step()
    trainer.run_step()
    with pytest.raises(TrainingError, match="3 steps in a row"):
        trainer.run_step()
    assert trainer.weights_are_finite()


def test_weights_that_are_not_finite_are_seen() -> None:
    trainer = make_trainer()
    with torch.no_grad():
        next(trainer.model.parameters())[0, 0] = float("inf")
    assert not trainer.weights_are_finite()
