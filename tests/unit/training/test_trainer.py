"""Optimizer steps: accumulation, learning, precision, dropout and what is not finite."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
import torch

from llmserve.errors import ConfigError, TrainingError
from llmserve.model.transformer import Transformer
from llmserve.training.batches import StreamWindows
from llmserve.training.trainer import Trainer
from support.training_runs import tiny_recipe

IDS = (np.arange(4000) * 7 % 97 % 50).astype(np.uint16)


def make_trainer(*, precision: Any = "float32", threads: int = 1, **changes: Any) -> Trainer:
    recipe = tiny_recipe(**changes)
    model = Transformer(recipe.model_config(vocab_size=300), dropout=recipe.dropout)
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
    assert run(whole, 5) == pytest.approx(run(parts, 5), rel=1e-6)
    assert whole.state.position == parts.state.position == 160
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
    settings = {"steps": 40, "learning_rate": 0.01}
    exact = run(make_trainer(**settings), 40)
    rounded = run(make_trainer(precision="bfloat16", **settings), 40)
    assert exact[-1] < 0.6 * exact[0]
    assert rounded == pytest.approx(exact, rel=0.01)


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
    plain, calls = trainer.objective.training_loss_sum, iter(range(10**6))

    def broken(*batch: torch.Tensor | None) -> torch.Tensor:
        loss = plain(*batch)
        return loss * value if next(calls) in bad_parts else loss

    trainer.objective.training_loss_sum = broken  # type: ignore[method-assign]


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


def test_blocks_that_are_computed_again_change_nothing() -> None:
    plain = make_trainer(dropout=0.2)
    again = make_trainer(dropout=0.2, activation_checkpointing=True)
    assert run(again, 3) == run(plain, 3)
    assert torch.equal(weights(again), weights(plain))


def test_average_follows_the_weights() -> None:
    trainer = make_trainer(ema_decay=0.5)
    assert trainer.average is not None
    expected = weights(trainer)
    for step in range(1, 13):
        trainer.run_step()
        kept = min(0.5, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * weights(trainer)
    own = weights(trainer)
    with trainer.average.swapped_in():
        torch.testing.assert_close(weights(trainer), expected)
    assert torch.equal(weights(trainer), own)


def test_float16_learns_like_float32_and_its_scale_stays_out_of_the_figures() -> None:
    exact, half = make_trainer(), make_trainer(precision="float16")
    assert half.state.loss_scale > 1
    norms = [(exact.run_step().grad_norm, half.run_step().grad_norm) for _ in range(6)]
    assert [norm for _, norm in norms] == pytest.approx([norm for norm, _ in norms], rel=0.02)
    assert run(half, 3) == pytest.approx(run(exact, 3), rel=0.01)


def test_overflow_of_float16_halves_the_scale_and_is_no_failure() -> None:
    trainer = make_trainer(precision="float16", max_skipped_steps=0)
    before, scale = weights(trainer), trainer.state.loss_scale
    make_loss_not_finite(trainer, {0, 2}, float("inf"))
    assert trainer.run_step().is_skipped
    assert trainer.state.loss_scale == scale / 2
    assert torch.equal(weights(trainer), before)
    trainer.state.loss_scale = 1.0
    make_loss_not_finite(trainer, {0}, float("inf"))
    with pytest.raises(TrainingError, match="not finite"):
        trainer.run_step()


def test_layers_are_measured_without_changing_the_step() -> None:
    plain, measured = make_trainer(), make_trainer()
    result = measured.run_step(measure_layers=True)
    plain.run_step()
    assert torch.equal(weights(measured), weights(plain))
    assert result.layers is not None
    assert list(result.layers.grad_norms) == ["embedding", "layer 0", "layer 1", "output"]
    norm = sum(value**2 for value in result.layers.grad_norms.values()) ** 0.5
    assert norm == pytest.approx(result.grad_norm, rel=1e-5)
    fresh = make_trainer().model.embed_tokens.weight.detach()
    moved = (measured.model.embed_tokens.weight.detach() - fresh).norm() / fresh.norm()
    assert result.layers.update_ratios["embedding"] == pytest.approx(float(moved), rel=1e-5)


def test_experts_learn_and_the_balance_loss_spreads_the_tokens() -> None:
    crowded = []
    for balance in (0.0, 1.0):
        trainer = make_trainer(
            num_experts=4, num_experts_per_token=1, balance_loss=balance, learning_rate=0.02
        )
        with torch.no_grad():  # all tokens prefer the first expert
            for block in trainer.model.layers:
                block.mlp.gate.weight[1:] *= 0.1
        losses = run(trainer, 25)
        assert losses[-1] < losses[0]
        trainer.objective.routers.take_counts()
        run(trainer, 1)
        crowded.append(
            max(float(n.max() / n.mean()) for n in trainer.objective.routers.take_counts().values())
        )
    assert crowded[1] < 2 < crowded[0]


def test_compiled_model_computes_the_training_and_the_plain_one_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def compiled(model: Transformer, **options: Any) -> Any:
        def forward(*arguments: Any) -> torch.Tensor:
            calls.append(options)
            return model(*arguments)  # type: ignore[no-any-return]

        return forward

    monkeypatch.setattr(torch, "compile", compiled)
    plain, faster = make_trainer(), make_trainer(compile=True)
    assert run(faster, 2) == run(plain, 2)
    assert len(calls) == 4  # two parts of each step
    faster.loss_sum(torch.zeros(1, 16, dtype=torch.int64), torch.zeros(1, 16, dtype=torch.int64))
    assert len(calls) == 4


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"found none of g\+\+, clang\+\+"):
        make_trainer(compile=True)
