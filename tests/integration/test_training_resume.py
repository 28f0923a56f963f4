"""A run that is killed, or whose disk is full, goes on and ends with the same weights."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from llmserve import failpoints
from llmserve.checkpoint import Checkpoint
from llmserve.cli import main
from llmserve.errors import ConfigError, DataError, TrainingError
from llmserve.training import finish
from llmserve.training.log import read_log
from llmserve.training.objective import Objective
from llmserve.training.plan import StepPlanner
from llmserve.training.recipe import TrainingRecipe
from llmserve.training.run_loop import RunOutcome
from llmserve.training.trainer import StepResult, Trainer
from llmserve.training.training_run import run_training
from support.training_runs import (
    SilentReporter,
    run_until,
    tiny_recipe,
    write_picture,
    write_text,
)

WEIGHTS = "model/model.safetensors"


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.disarm_all()


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "draw_loss_curve", write_picture)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """sha256 of the weights of a run from beginning to end."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(text, out)
    return digest(out)


def train(text: Path | None, out: Path, recipe: TrainingRecipe | None = None) -> RunOutcome:
    sources = [] if text is None else [str(text)]
    return run_training(recipe or tiny_recipe(dropout=0.1), sources, out, reporter=SilentReporter())


def digest(out: Path) -> str:
    return hashlib.sha256((out / WEIGHTS).read_bytes()).hexdigest()


def command(text: Path, out: Path, recipe: TrainingRecipe) -> list[str]:
    """The command line that trains with `recipe`."""
    options = [sys.executable, "-m", "llmserve", "train", "--text", str(text), "--out", str(out)]
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if value is not None and not isinstance(value, bool):
            options += ["--" + field.name.replace("_", "-"), str(value)]
    return options


@pytest.mark.parametrize(
    ("failpoint", "leaves_half_a_checkpoint"),
    [
        ("train.micro_batch=kill@6", False),  # in the middle of step 3, before any checkpoint
        ("train.micro_batch=kill@14", False),  # in the middle of step 7, after one
        ("ckpt.write=kill@130", True),  # while the second one is written
    ],
)
def test_r27_killed_run_ends_with_the_same_weights(
    text: Path, tmp_path: Path, undisturbed: str, failpoint: str, leaves_half_a_checkpoint: bool
) -> None:
    out = tmp_path / "run"
    status = run_until(failpoint, lambda: train(text, out))
    assert os.WTERMSIG(status) == signal.SIGKILL
    half = [path for path in out.glob("checkpoints/.step-*") if path.is_dir()]
    assert bool(half) == leaves_half_a_checkpoint
    train(text, out)
    assert digest(out) == undisturbed
    assert not list(out.glob("**/.*.tmp-*"))


def test_r27_run_killed_at_ten_random_moments_ends_with_the_same_weights(
    text: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(steps=40, dropout=0.1, ema_decay=0.9, optimizer="muon", schedule="wsd")
    train(text, tmp_path / "whole", recipe)
    # Steps and file operations: a life gets one or two checkpoints further at most.
    most = {"train.micro_batch": 14, "durable.op": 60}
    out, choose, lives = tmp_path / "run", random.Random(0), 0
    while lives < 10:
        place = choose.choice(list(most))
        failpoint = f"{place}=kill@{choose.randint(1, most[place])}"
        status = run_until(failpoint, lambda: train(text, out, recipe))
        assert os.WIFSIGNALED(status), "the run came to its end: its moments were not early enough"
        lives += 1
    train(text, out, recipe)
    assert digest(out) == digest(tmp_path / "whole")
    assert not list(out.glob("**/.*.tmp-*"))


@pytest.mark.parametrize(
    "changes",
    [
        {"ema_decay": 0.9, "precision": "float16"},
        {"optimizer": "muon", "schedule": "wsd"},
        {"num_experts": 4, "activation_checkpointing": True},
        pytest.param({"optimizer": "adamw8bit"}, marks=pytest.mark.bnb),
    ],
)
def test_r27_every_kind_of_state_is_in_the_checkpoint(
    text: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    recipe = tiny_recipe(log_every=4, **changes)
    train(text, tmp_path / "whole", recipe)
    failpoints.arm("train.micro_batch=raise@21")
    with pytest.raises(failpoints.FailpointError):
        train(text, tmp_path / "stopped", recipe)
    failpoints.disarm_all()
    train(text, tmp_path / "stopped", recipe)
    assert digest(tmp_path / "stopped") == digest(tmp_path / "whole")
    logs = [read_log(tmp_path / name / "training_log.jsonl") for name in ("whole", "stopped")]
    for whole, stopped in zip(*logs, strict=True):
        assert stopped.get("loss") == whole.get("loss")
        assert stopped.get("held_out_loss") == whole.get("held_out_loss")


def test_run_that_no_longer_learns_stops_with_its_best_weights(text: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        steps=400, learning_rate=0.3, final_learning_rate=0.3, evaluate_every=2, early_stop=3,
        checkpoint_every=1000, keep_checkpoints=1,
    )  # fmt: skip
    outcome = train(text, tmp_path / "run", recipe)
    evaluations = [
        line
        for line in read_log(tmp_path / "run" / "training_log.jsonl")
        if "held_out_loss" in line
    ]
    best = min(evaluations, key=lambda line: float(line["held_out_loss"]))
    assert outcome.result is not None
    assert outcome.result["steps"] == evaluations[-1]["step"] == best["step"] + 6
    assert outcome.result["held_out_loss"] == pytest.approx(best["held_out_loss"], rel=1e-3)
    failpoints.arm("train.micro_batch=raise@11")
    with pytest.raises(failpoints.FailpointError):
        train(text, tmp_path / "stopped", recipe)
    failpoints.disarm_all()
    train(text, tmp_path / "stopped", recipe)
    assert digest(tmp_path / "stopped") == digest(tmp_path / "run")


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_stopped_run_on_two_threads_ends_with_the_same_weights(
    text: Path, tmp_path: Path, packing: str
) -> None:
    recipe = tiny_recipe(threads=2, precision="bfloat16", packing=packing)
    train(text, tmp_path / "whole", recipe)
    failpoints.arm("train.micro_batch=raise@15")
    with pytest.raises(failpoints.FailpointError):
        train(text, tmp_path / "stopped", recipe)
    failpoints.disarm_all()
    train(text, tmp_path / "stopped", recipe)
    assert digest(tmp_path / "stopped") == digest(tmp_path / "whole")


def test_r28_full_disk_at_any_write_loses_nothing(
    text: Path, tmp_path: Path, undisturbed: str
) -> None:
    # Some 500 operations make a run; every 83rd fails here, in each of its phases.
    for number in range(1, 520, 83):
        out = tmp_path / f"run{number}"
        failpoints.arm(f"durable.op=enospc@{number}")
        with pytest.raises(TrainingError, match=r"run\d+: [^ ]+: No space left"):
            train(text, out)
        failpoints.disarm_all()
        assert not list(out.glob("**/.*.tmp-*"))
        train(text, out)
        assert digest(out) == undisturbed


def test_r28_sigterm_leaves_a_checkpoint(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = command(text, out, tiny_recipe(steps=10**6))
    with subprocess.Popen(options, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 40
        while not (out / "checkpoints" / "last.json").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, messages = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "Traceback" not in messages
    assert "the same command goes on" in messages
    newest = max((out / "checkpoints").glob("step-*"))
    assert Checkpoint.open(newest / "model").names()
    assert not list(out.glob("**/.*.tmp-*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_r28_a_signal_ends_the_run_after_the_step_it_came_in(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    step = Trainer.run_step

    def signalled(trainer: Trainer, **options: bool) -> StepResult:
        if trainer.state.step == 6:
            os.kill(os.getpid(), number)
        return step(trainer, **options)

    monkeypatch.setattr(Trainer, "run_step", signalled)
    out = tmp_path / "run"
    assert main(command(text, out, tiny_recipe())[3:]) == code
    assert json.loads((out / "checkpoints" / "last.json").read_text())["folder"] == "step-00000007"


def test_finished_run_is_not_run_again(text: Path, tmp_path: Path) -> None:
    first = train(text, tmp_path / "run")
    changed = (tmp_path / "run" / WEIGHTS).stat().st_mtime_ns
    again = train(None, tmp_path / "run")
    assert again.result == first.result
    assert (tmp_path / "run" / WEIGHTS).stat().st_mtime_ns == changed


def test_another_recipe_or_text_is_refused_and_restart_begins_anew(
    text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(text, out, tiny_recipe())
    with pytest.raises(ConfigError, match="seed 0 → 1"):
        train(text, out, tiny_recipe(seed=1))
    with pytest.raises(DataError, match="another text"):
        train(write_text(tmp_path / "other.txt", seed=1), out, tiny_recipe())
    before = digest(out)
    run_training(tiny_recipe(seed=1), [str(text)], out, reporter=SilentReporter(), restart=True)
    assert digest(out) != before


def test_run_without_a_checkpoint_may_begin_again_with_another_recipe(
    text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(DataError, match="too little text"):
        train(text, out, tiny_recipe(max_seq_len=10**5))
    assert train(text, out, tiny_recipe()).result is not None


def test_restart_that_cannot_begin_removes_nothing(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(text, out)
    for sources, message in (([], "--text"), ([str(tmp_path / "none.txt")], "no such text")):
        with pytest.raises((ConfigError, DataError), match=message):
            run_training(tiny_recipe(), sources, out, reporter=SilentReporter(), restart=True)
    assert digest(out)


def test_new_run_needs_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--text"):
        train(None, tmp_path / "run")


def test_time_budget_is_planned_once(text: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(minutes=0.01, evaluate_every=10**6, checkpoint_every=10**6)
    began = time.monotonic()
    outcome = train(text, tmp_path / "run", recipe)
    assert outcome.result is not None
    assert outcome.result["steps"] > 3  # those that are not timed
    assert time.monotonic() - began < 30  # seconds, for a budget of 0.6 on a very busy machine
    assert train(None, tmp_path / "run", recipe).result == outcome.result


def test_a_plan_makes_no_more_passes_than_allowed(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepPlanner, "after_step", lambda planner, step: 10**6)
    outcome = train(text, tmp_path / "run", tiny_recipe(minutes=60.0, max_passes=0.5))
    assert outcome.result is not None
    assert 0.4 < outcome.result["epochs"] <= 0.5


def test_r28_run_whose_loss_stays_not_finite_keeps_its_checkpoint(
    text: Path, tmp_path: Path, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = Objective.training_loss_sum, iter(range(10**6))

    def broken(self: Objective, *batch: torch.Tensor | None) -> torch.Tensor:
        loss = plain(self, *batch)
        return loss * float("nan") if next(calls) >= 10 else loss  # two parts of each step

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Objective, "training_loss_sum", broken)
        with pytest.raises(TrainingError, match="not finite"):
            train(text, out)
    assert (out / "checkpoints" / "step-00000004").is_dir()
    assert not (out / "checkpoints" / "step-00000012").exists()
    for line in (out / "training_log.jsonl").read_text().splitlines():
        assert "NaN" not in line
