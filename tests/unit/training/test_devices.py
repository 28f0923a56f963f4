"""Training away from the host's memory.

torch's device `meta` stands for a GPU: its tensors have shapes and no values, and an operation that
mixes them with the host's fails as it does on a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llmserve.config import Head
from llmserve.errors import ConfigError
from llmserve.model.transformer import Transformer
from llmserve.training.batches import StreamWindows, Windows
from llmserve.training.data_packing import PackedWindows
from llmserve.training.devices import autocast, training_device
from llmserve.training.finetune_model import TunedModel
from llmserve.training.heads_classify import ClassifyExample, ClassifyTask
from llmserve.training.heads_embed import EmbedTask
from llmserve.training.heads_span import SpanExample, SpanTask
from llmserve.training.lora_weights import LoraWeights
from llmserve.training.objective import resolve_precision
from llmserve.training.optimizer import load_optimizer_tensors, optimizer_tensors
from llmserve.training.preference_dpo import DpoTask, PairExample
from llmserve.training.trainer import Trainer
from support.training_runs import tiny_config, tiny_recipe
from support.tuned import PROJECTIONS, random_examples, random_row

IDS = (np.arange(400) * 7 % 97 % 50).astype(np.uint16)
AWAY = torch.device("meta")


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def make_trainer(*, packed: bool = False, **changes: Any) -> tuple[Trainer, Windows]:
    recipe = tiny_recipe(device="cuda", **changes)
    model = Transformer(recipe.model_config(vocab_size=300)).to(AWAY)
    windows: Windows = StreamWindows(IDS, context=16, seed=0)
    if packed:
        windows = PackedWindows(IDS, np.arange(0, 400, 10), context=16, seed=0, end_id=0)
    return Trainer(model, recipe, windows, precision="float32", threads=2), windows


def test_each_process_has_the_gpu_of_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 2)
    assert training_device("cuda", local_rank=1) == torch.device("cuda", 1)
    assert training_device("cpu", local_rank=5) == torch.device("cpu")
    with pytest.raises(
        ConfigError, match="3 processes or more on this machine, and torch finds 2 GPUs"
    ):
        training_device("cuda", local_rank=2)


def test_no_gpu_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0)
    with pytest.raises(ConfigError, match=r"finds no CUDA devices.*compute on the CPU"):
        training_device("cuda")


@pytest.mark.parametrize(("has_bfloat16", "expected"), [(True, "bfloat16"), (False, "float16")])
def test_precision_follows_the_gpu(
    monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: has_bfloat16)
    assert resolve_precision("auto", "cuda") == expected
    assert resolve_precision("float32", "cuda") == "float32"


def test_casts_are_shared_by_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: asked.append((args, options)))
    autocast(torch.device("cpu"), torch.bfloat16)
    autocast(torch.device("cuda", 1), torch.float16)
    with autocast(AWAY, torch.float32):
        pass
    assert asked == [
        (("cpu",), {"dtype": torch.bfloat16, "cache_enabled": False}),
        (("cuda",), {"dtype": torch.float16, "cache_enabled": True}),
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"packed": True},
        {"positions": "learned", "norm": "layernorm", "activation": "gelu", "bias": True},
        {"positions": "sinusoidal"},
        {"optimizer": "muon", "ema_decay": 0.9},
        {"activation_checkpointing": True},
    ],
    ids=str,
)
def test_a_step_is_made_where_the_model_is(changes: dict[str, Any]) -> None:
    trainer, windows = make_trainer(**changes)
    loss, objective = trainer.objective.with_penalty(*windows.read(0, 4))
    assert loss.device == objective.device == AWAY
    objective.backward()  # type: ignore[no-untyped-call]
    assert torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0).device == AWAY
    trainer.optimizer.step()
    if trainer.average is not None:
        trainer.average.update(1)
    for name, tensor in optimizer_tensors(trainer.optimizer, trainer.model).items():
        assert tensor.device == AWAY, name


def test_a_checkpoint_goes_where_the_model_is() -> None:
    trainer, windows = make_trainer()
    trainer.objective.with_penalty(*windows.read(0, 4))[1].backward()  # type: ignore[no-untyped-call]
    trainer.optimizer.step()
    shapes = optimizer_tensors(trainer.optimizer, trainer.model)
    stored = {name: torch.zeros(tensor.shape) for name, tensor in shapes.items()}
    load_optimizer_tensors(trainer.optimizer, trainer.model, stored)
    for name, tensor in optimizer_tensors(trainer.optimizer, trainer.model).items():
        assert tensor.device == AWAY, name


def test_threads_do_not_share_a_gpus_batch() -> None:
    trainer, _ = make_trainer()
    tensors = torch.zeros(4), torch.zeros(4)
    assert trainer._gradients.workers.map(lambda a, b: len(a), *tensors) == [4]


@pytest.mark.parametrize("kind", ["classify", "span", "embed", "dpo", "text"])
def test_tasks_compute_where_the_model_is(kind: str) -> None:
    heads = {
        "classify": Head(kind="sequence", labels=("a", "b")),
        "span": Head(kind="span", labels=("start", "end")),
        "embed": Head(kind="embedding"),
    }
    config = tiny_config(head=heads.get(kind))
    lora = LoraWeights(config, PROJECTIONS, rank=2, alpha=4.0, seed=0, device=AWAY)
    tuned = TunedModel(Transformer(config).to(AWAY), lora, {})
    rows = (random_row(6, num_targets=2), random_row(5, num_targets=2))
    tokenizer: Any = None
    encoder: Any = type("Encoder", (), {"source": ""})()
    if kind == "classify":
        task: Any = ClassifyTask(tokenizer, ("a", "b"))
        examples: list[Any] = [ClassifyExample((row,), 1) for row in rows]
    elif kind == "span":
        task, examples = SpanTask(tokenizer), [SpanExample((row,), 3, 4, 2) for row in rows]
    elif kind == "embed":
        task, examples = EmbedTask(tokenizer, temperature=0.1), random_examples(3, rows=2)
    elif kind == "dpo":
        task, examples = DpoTask(encoder, beta=0.1), [PairExample(rows)]
    else:
        from llmserve.training.finetune_language import TextTask

        task, examples = TextTask(tokenizer), random_examples(3)
    assert task.loss(tuned, examples).device == AWAY
