"""From a recipe to its task: the one table of what can be learned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmserve.config import Head
from llmserve.errors import ConfigError
from llmserve.text.tokenizer import Tokenizer

from .devices import training_device
from .distill_task import DistillTask, load_teacher
from .finetune_chats import ChatEncoder
from .finetune_language import ChatTask, TextTask
from .finetune_recipe import FinetuneRecipe
from .finetune_rows import Row
from .finetune_task import Task
from .heads_classify import ClassifyTask, find_labels
from .heads_embed import EmbedTask
from .heads_reward import RewardTask
from .heads_span import SpanTask
from .preference_dpo import DpoTask

__all__ = ["make_task"]


def make_task(
    recipe: FinetuneRecipe, tokenizer: Tokenizer, head: Head | None, rows: Sequence[Row]
) -> Task[Any]:
    """The task of a recipe.

    Args:
        recipe: Which one, and its settings.
        tokenizer: The model's.
        head: The head that the model has already; a classifier's labels are kept.
        rows: All rows of the data, for the labels in them.

    Raises:
        ConfigError: a template or teacher that cannot be used, or labels other than the model's.
        CheckpointError: the teacher's folder cannot be used.
        DataError: rows without labels.
    """
    if recipe.task == "text":
        return TextTask(tokenizer)
    if recipe.task == "classify":
        return ClassifyTask(tokenizer, _labels(recipe, head, rows))
    if recipe.task == "span":
        return SpanTask(tokenizer)
    if recipe.task == "embed":
        return EmbedTask(tokenizer, temperature=_given(recipe.temperature, 0.05))
    encoder = ChatEncoder(tokenizer, template=_template(recipe))
    if recipe.task == "instruct":
        return ChatTask(encoder)
    if recipe.task == "reward":
        return RewardTask(encoder)
    if recipe.task == "dpo":
        return DpoTask(encoder, beta=_given(recipe.beta, 0.1))
    return DistillTask(
        load_teacher(Path(recipe.teacher), tokenizer, training_device(recipe.device)),
        TextTask(tokenizer),
        ChatTask(encoder),
        temperature=_given(recipe.temperature, 2.0),
        cross_entropy=_given(recipe.cross_entropy, 0.5),
    )


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _labels(recipe: FinetuneRecipe, head: Head | None, rows: Sequence[Row]) -> tuple[str, ...]:
    """The model's labels, those given, or those of the data."""
    given = recipe.label_names()
    if head is not None and head.kind == "sequence":
        if given and given != head.labels:
            raise ConfigError(f"the model's labels are {', '.join(head.labels)}; leave out labels")
        return head.labels
    if len(given) == 1 or len(set(given)) != len(given):
        raise ConfigError(f"labels must be two or more different names, got {recipe.labels!r}")
    return given or find_labels(rows)


def _template(recipe: FinetuneRecipe) -> str | None:
    if not recipe.chat_template:
        return None
    try:
        return Path(recipe.chat_template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"chat_template {recipe.chat_template}: cannot be read: {error}"
        ) from error
