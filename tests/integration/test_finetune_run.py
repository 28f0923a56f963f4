"""Every task from rows to a model folder; what is interrupted goes on to the same weights."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from llmserve import failpoints
from llmserve.checkpoint import Checkpoint
from llmserve.cli import main
from llmserve.errors import ConfigError, DataError, TrainingError
from llmserve.lineage import TRAINING_LOG
from llmserve.llm import LLM
from llmserve.model.weights import load_model
from llmserve.tensor_file import map_tensors
from llmserve.text.tokenizer import Tokenizer
from llmserve.training import finetune_finish
from llmserve.training.finetune_recipe import FinetuneRecipe
from llmserve.training.finetune_run import run_finetuning
from llmserve.training.finetune_trainer import FinetuneTrainer, TuningStep
from llmserve.training.log import read_log
from support.finetuning import (
    finetune,
    rows_for,
    tiny_finetune_recipe,
    weights_sha256,
    write_rows,
)
from support.models import make_model_folder
from support.training_runs import SilentReporter, run_until

TASKS = ("text", "instruct", "classify", "span", "embed", "reward", "dpo", "distill")
HEADS = {"classify": "sequence", "span": "span", "embed": "embedding", "reward": "sequence"}


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.disarm_all()


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end without drawing, which takes as long as all their steps."""
    monkeypatch.setattr(finetune_finish, "draw_loss_curve", lambda path, lines: None)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "chats.jsonl", rows_for("instruct"))


@pytest.fixture(scope="module")
def undisturbed(base: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """sha256 of the weights of a LoRA run from beginning to end."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    finetune(lora_recipe(), base, chats, out)
    return weights_sha256(out)


def lora_recipe() -> FinetuneRecipe:
    return tiny_finetune_recipe(method="lora", dropout=0.1)


def command(base: Path, data: Path, out: Path, recipe: FinetuneRecipe) -> list[str]:
    """The arguments that fine-tune with `recipe`."""
    options = ["finetune", recipe.task, str(base)]
    options += ["--data", str(data), "--out", str(out)]
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if value not in (None, "") and field.name != "task":
            options += ["--" + field.name.replace("_", "-"), str(value)]
    return options


@pytest.mark.parametrize(
    ("task", "method"),
    [*((task, "lora") for task in TASKS), ("instruct", "full")],
)
def test_every_task_learns_and_leaves_a_model_folder(
    base: Path, tmp_path: Path, task: str, method: str
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", rows_for(task))
    more = {}
    if task == "distill":  # the teacher is another model than the student
        more = {"teacher": str(make_model_folder(tmp_path / "teacher", seed=1))}
    recipe = tiny_finetune_recipe(task=task, method=method, steps=20, keep="last", **more)
    result = finetune(recipe, base, data, tmp_path / "run").result
    assert result is not None
    assert result["after"]["held_out_loss"] < result["before"]["held_out_loss"]
    checkpoint = Checkpoint.open(tmp_path / "run" / "model")
    head = checkpoint.config.head
    assert (None if head is None else head.kind) == HEADS.get(task)
    assert Tokenizer.load(checkpoint.path).vocab_size == 320
    assert (tmp_path / "run" / "adapter").is_dir() == (method == "lora" and task not in HEADS)


def test_the_span_head_answers_the_questions_it_was_trained_on(base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", rows_for("span"))
    recipe = tiny_finetune_recipe(task="span", steps=60, evaluate_every=60, keep="last")
    result = run_finetuning(
        recipe, base, [data], tmp_path / "run", reporter=SilentReporter(), held_out_data=[data]
    ).result
    assert result is not None
    assert result["before"]["exact_match"] < 0.2
    assert result["after"]["exact_match"] > 0.9


def test_adapter_beside_the_base_and_merged_model_give_the_same_logits(
    base: Path, chats: Path, tmp_path: Path
) -> None:
    finetune(lora_recipe(), base, chats, tmp_path / "run")
    command = ["merge", str(base), str(tmp_path / "run" / "adapter")]
    command += ["--out", str(tmp_path / "merged")]
    assert main(command) == 0
    assert main(command) == 2  # what is there stays, unless it is to be replaced
    assert main([*command, "--overwrite"]) == 0
    ids = torch.randint(320, (2, 40), generator=torch.Generator().manual_seed(0))
    own, again = (
        load_model(Checkpoint.open(folder))(ids)
        for folder in (tmp_path / "run" / "model", tmp_path / "merged")
    )
    assert torch.equal(own, again)
    prompts = [row.tolist() for row in ids]
    with (
        LLM(base, runner="torch", adapters={"tuned": tmp_path / "run" / "adapter"}) as beside,
        LLM(tmp_path / "merged", runner="torch") as merged,
    ):
        found = beside.score(prompts, adapter="tuned")
        for one, other in zip(found, merged.score(prompts), strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        plain = beside.score(prompts)
    assert max(abs(a - b) for a, b in zip(found[0].logprobs, plain[0].logprobs, strict=True)) > 0.01


def test_answers_end_and_the_template_comes_along(base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {n}", "response": f"{n} it is"} for n in range(12)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' }}"
        "\n{% endfor %}"
    )
    recipe = tiny_finetune_recipe(chat_template=str(template), steps=2)
    finetune(recipe, base, data, tmp_path / "run")
    tokenizer = Tokenizer.load(tmp_path / "run" / "model")
    assert tokenizer.chat_template == template.read_text()
    assert Checkpoint.open(tmp_path / "run" / "model").config.eos_token_ids == (0,)


def test_classifier_is_trained_on_with_its_labels(base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", rows_for("classify"))
    recipe = tiny_finetune_recipe(task="classify")
    first = finetune(recipe, base, data, tmp_path / "one").result
    again = finetune(recipe, tmp_path / "one" / "model", data, tmp_path / "two").result
    assert first is not None
    assert again is not None
    assert again["before"]["held_out_loss"] == pytest.approx(first["after"]["held_out_loss"])
    rows = [{"text": f"a {number}", "label": "x"} for number in range(20)]
    strange = write_rows(tmp_path / "strange.jsonl", rows)
    with pytest.raises(
        DataError, match=r"line \d+: the label 'x' is none of Lily, a dog, the park"
    ):
        finetune(recipe, tmp_path / "one" / "model", strange, tmp_path / "three")
    chats = write_rows(tmp_path / "chats.jsonl", rows_for("instruct"))
    with pytest.raises(ConfigError, match="has a head"):
        finetune(tiny_finetune_recipe(), tmp_path / "one" / "model", chats, tmp_path / "four")


def test_the_best_weights_are_kept(base: Path, tmp_path: Path) -> None:
    rows = rows_for("classify")
    data = write_rows(tmp_path / "rows.jsonl", rows)
    # Every label is wrong: the more is learned, the worse it gets on these.
    wrong = {"Lily": "a dog", "a dog": "the park", "the park": "Lily"}
    others = write_rows(
        tmp_path / "others.jsonl", [{**row, "label": wrong[row["label"]]} for row in rows]
    )
    results = []
    for keep in ("best", "last"):
        recipe = tiny_finetune_recipe(task="classify", evaluate_every=1, keep=keep)
        outcome = run_finetuning(
            recipe,
            base,
            [data],
            tmp_path / keep,
            reporter=SilentReporter(),
            held_out_data=[others],
        )
        assert outcome.result is not None
        results.append(outcome.result)
    best, last = results
    assert best["kept_step"] < last["kept_step"] == 12
    assert best["after"]["held_out_loss"] < last["after"]["held_out_loss"]
    scores = [
        line["held_out_loss"]
        for line in read_log(tmp_path / "best" / TRAINING_LOG)[1:]
        if "held_out_loss" in line
    ]
    assert best["after"]["held_out_loss"] == pytest.approx(min(scores), rel=1e-5)


@pytest.mark.parametrize(
    "failpoint",
    [
        "train.micro_batch=kill@14",  # in the middle of step 7, after one
        "ckpt.write=kill@40",  # while one is written
    ],
)
def test_killed_run_ends_with_the_same_weights(
    base: Path, chats: Path, tmp_path: Path, undisturbed: str, failpoint: str
) -> None:
    out = tmp_path / "run"
    status = run_until(failpoint, lambda: finetune(lora_recipe(), base, chats, out))
    assert os.WTERMSIG(status) == signal.SIGKILL
    finetune(lora_recipe(), base, chats, out)
    assert weights_sha256(out) == undisturbed
    assert not list(out.glob("**/.*.tmp-*"))


def test_full_disk_at_any_write_loses_nothing(
    base: Path, chats: Path, tmp_path: Path, undisturbed: str
) -> None:
    for number in (3, 77, 150):
        out = tmp_path / f"run{number}"
        failpoints.arm(f"durable.op=enospc@{number}")
        with pytest.raises(TrainingError, match="No space left"):
            finetune(lora_recipe(), base, chats, out)
        failpoints.disarm_all()
        finetune(lora_recipe(), base, chats, out)
        assert weights_sha256(out) == undisturbed


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_signal_leaves_a_checkpoint_of_the_last_step(
    base: Path,
    chats: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
) -> None:
    step = FinetuneTrainer.run_step

    def signalled(trainer: FinetuneTrainer) -> TuningStep:
        if trainer.state.step == 6:
            os.kill(os.getpid(), number)
        return step(trainer)

    monkeypatch.setattr(FinetuneTrainer, "run_step", signalled)
    out = tmp_path / "run"
    assert main(command(base, chats, out, tiny_finetune_recipe())) == code
    assert "the same command goes on" in capsys.readouterr().err
    assert json.loads((out / "checkpoints" / "last.json").read_text())["folder"] == "step-00000007"


def test_finished_run_is_not_run_again_and_another_recipe_or_data_is_refused(
    base: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    monkeypatch.undo()  # this one is drawn
    first = finetune(tiny_finetune_recipe(), base, chats, out)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert finetune(tiny_finetune_recipe(), base, chats, out).result == first.result
    with pytest.raises(ConfigError, match="seed 0 → 1"):
        finetune(tiny_finetune_recipe(seed=1), base, chats, out)
    others = write_rows(tmp_path / "others.jsonl", rows_for("instruct", seed=1))
    with pytest.raises(DataError, match="another data"):
        finetune(tiny_finetune_recipe(), base, others, out)
    with pytest.raises(DataError, match="another model"):
        finetune(tiny_finetune_recipe(), make_model_folder(tmp_path / "m", seed=2), chats, out)


def test_a_run_that_cannot_begin_removes_nothing(base: Path, chats: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    finetune(tiny_finetune_recipe(), base, chats, out)
    before = weights_sha256(out)
    strange = write_rows(tmp_path / "strange.jsonl", [{"prompt": f"{n}"} for n in range(20)])
    for recipe, model, data, message in (
        (tiny_finetune_recipe(), base, strange, "the field 'response' must be"),
        (tiny_finetune_recipe(max_tokens=10**4), base, chats, "the model's context is 256"),
        (tiny_finetune_recipe(), out / "model", chats, "lies in the run's folder"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            run_finetuning(recipe, model, [data], out, reporter=SilentReporter(), restart=True)
    assert weights_sha256(out) == before


def test_a_folder_of_another_kind_of_run_is_left_alone(
    base: Path, chats: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"format": "llmserve-run-1"}')
    with pytest.raises(ConfigError, match="holds no run of the format llmserve-finetune-1"):
        finetune(tiny_finetune_recipe(), base, chats, tmp_path / "run")
    assert (tmp_path / "run" / "run.json").read_text() == '{"format": "llmserve-run-1"}'


def test_another_template_under_the_same_name_is_refused(
    base: Path, chats: Path, tmp_path: Path
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    recipe = tiny_finetune_recipe(chat_template=str(template))
    finetune(recipe, base, chats, tmp_path / "run")
    template.write_text("{% for m in messages %}{{ m['content'] }}\n\n{% endfor %}")
    with pytest.raises(DataError, match="another template or teacher"):
        finetune(recipe, base, chats, tmp_path / "run")


def test_loss_that_is_not_finite_ends_the_run_with_the_last_checkpoint(
    base: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulate = FinetuneTrainer._accumulate

    def broken(trainer: FinetuneTrainer) -> tuple[float, int]:
        loss, tokens = accumulate(trainer)
        return (math.nan if trainer.state.step >= 5 else loss), tokens

    monkeypatch.setattr(FinetuneTrainer, "_accumulate", broken)
    with pytest.raises(TrainingError, match="6 steps in a row, up to step 11"):
        finetune(tiny_finetune_recipe(), base, chats, tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    weights = map_tensors(newest / "weights.safetensors")
    assert all(np.isfinite(array.data).all() for array in weights.values())
