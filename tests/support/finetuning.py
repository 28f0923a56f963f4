"""A model folder, rows and recipes small enough that a whole fine-tuning takes a second."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmserve.training.finetune_recipe import FinetuneRecipe
from llmserve.training.finetune_run import run_finetuning
from llmserve.training.run_loop import RunOutcome
from support.training_runs import SilentReporter

NAMES = ("Lily", "a dog", "the park", "a girl", "the day", "outside")


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_for(task: str, *, count: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with something to learn: what is right follows from the words."""
    choose = random.Random(seed)
    rows = []
    for number in range(count):
        name, place = choose.choice(NAMES[:3]), choose.choice(NAMES[3:])
        question = f"{number}: where is {name}?"
        right, wrong = f"{name} is in {place}.", f"no {number} no"
        rows.append(_ROWS[task](name, place, question, right, wrong))
    return rows


def _span(name: str, place: str, question: str, right: str, wrong: str) -> dict[str, Any]:
    answer = {"text": place, "answer_start": right.index(place)}
    return {"question": question, "context": f"{right} {wrong}", "answers": [answer]}


_ROWS: dict[str, Any] = {
    "text": lambda name, place, question, right, wrong: {"text": f"{question} {right}"},
    "instruct": lambda name, place, question, right, wrong: {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": right},
            {"role": "user", "content": "Really?"},
            {"role": "assistant", "content": "Yes."},
        ]
    },
    "classify": lambda name, place, question, right, wrong: {"text": right, "label": name},
    "span": _span,
    "embed": lambda name, place, question, right, wrong: {"query": question, "positive": right},
    "reward": lambda name, place, question, right, wrong: {
        "prompt": question,
        "chosen": right,
        "rejected": wrong,
    },
}
_ROWS["dpo"] = _ROWS["reward"]
_ROWS["distill"] = _ROWS["text"]


def tiny_finetune_recipe(**changes: Any) -> FinetuneRecipe:
    """Twelve steps, with checkpoints every 4; `changes` replace fields."""
    values: dict[str, Any] = {
        "steps": 12,
        "batch_size": 4,
        "accumulation": 2,
        "held_out": 0.2,
        "learning_rate": 0.01,
        "precision": "float32",
        "threads": 1,
        "evaluate_every": 6,
        "checkpoint_every": 4,
    }
    return FinetuneRecipe(**(values | changes))


def finetune(recipe: FinetuneRecipe, model: Path, data: Path, out: Path) -> RunOutcome:
    """Run it without a terminal."""
    return run_finetuning(recipe, model, [data], out, reporter=SilentReporter())


def weights_sha256(out: Path) -> str:
    """Of the finished model's weights."""
    return hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()
