"""A text and a recipe small enough that a whole training run takes a second."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmserve import failpoints
from llmserve.config import ModelConfig
from llmserve.durable import write_bytes
from llmserve.training.distributed import Processes, join_processes
from llmserve.training.recipe import TrainingRecipe

WORDS = ("a", "the", "list", "item", "value", "name", "file", "string", "returns", "holds", "is")
SEPARATOR = "\n---\n"


def write_text(path: Path, *, num_documents: int = 120, seed: int = 0) -> Path:
    """Documents of sentences made of a few words."""
    choose = random.Random(seed)
    documents = [
        " ".join(choose.choices(WORDS, k=choose.randint(20, 60))).capitalize() + "."
        for _ in range(num_documents)
    ]
    path.write_text(SEPARATOR.join(documents), encoding="utf-8")
    return path


def tiny_recipe(**changes: Any) -> TrainingRecipe:
    """A run of 12 steps, with checkpoints every 4; `changes` replace fields."""
    values: dict[str, Any] = {
        "vocab_size": 300,
        "separator": SEPARATOR,
        "held_out": 0.1,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "intermediate_size": 24,
        "max_seq_len": 16,
        "steps": 12,
        "batch_size": 4,
        "accumulation": 2,
        "warmup_steps": 2,
        "precision": "float32",
        "threads": 1,
        "evaluate_every": 4,
        "checkpoint_every": 4,
    }
    if "minutes" in changes:
        del values["steps"]
    return TrainingRecipe(**(values | changes))


def tiny_config(**changes: Any) -> ModelConfig:
    """The shape of `tiny_recipe` over 300 tokens."""
    values: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 8,
        "intermediate_size": 24,
        "max_seq_len": 16,
    }
    return ModelConfig(**(values | changes))


def run_until(failpoint: str, run: Callable[[], object]) -> int:
    """Call `run` in a copy of this process with the failpoint armed; its wait status.

    A copy needs no interpreter and no imports, and its end is as sudden as any process's.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            failpoints.arm(failpoint)
            run()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def run_as_processes(
    count: int, run: Callable[[Processes], object], *, failpoint: str = ""
) -> list[int]:
    """Call `run` in copies of this process that find each other as torchrun's do; wait statuses.

    The failpoint is armed in each of them.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                os.environ.update(meeting, TORCHELASTIC_RUN_ID="test", **ranks)
                failpoints.arm(failpoint)
                with join_processes() as processes:
                    run(processes)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitpid(child, 0)[1] for child in children]


def write_picture(path: Path, lines: object, *, unigram_loss: float) -> None:
    """In place of drawing a loss curve, which takes as long as all steps of a tiny run."""
    write_bytes(path, b"picture")


class SilentReporter:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[int] = []

    def note(self, text: str) -> None:
        """Keep the line."""
        self.notes.append(text)

    def progress(self, step: int, steps: int | None, *, loss: float, tokens_per_s: float) -> None:
        """Keep the step."""
        self.steps.append(step)
