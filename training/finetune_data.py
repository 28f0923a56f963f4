"""The examples of a fine-tuning: rows read, held out, and turned into what the task learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmserve.errors import DataError, RequestError

from .finetune_examples import Example, Lengths
from .finetune_recipe import FinetuneRecipe
from .finetune_rows import Row, read_rows, split_rows
from .finetune_task import Task

__all__ = ["Examples", "SplitRows", "make_examples", "read_split"]


@dataclass(frozen=True, slots=True)
class SplitRows:
    """Rows on both sides."""

    train: list[Row]
    held_out: list[Row]

    @property
    def all(self) -> list[Row]:
        """Those to train on, then those held out."""
        return self.train + self.held_out


@dataclass(frozen=True, slots=True)
class Examples:
    """What the rows became."""

    train: list[Example]
    """At least one."""
    held_out: list[Example]
    """May be none."""
    notes: list[str]
    """What was cut or left out, in words."""
    counts: dict[str, int]
    """The same as figures."""


def read_split(
    recipe: FinetuneRecipe, data: Sequence[Path], held_out_data: Sequence[Path]
) -> SplitRows:
    """Read the rows of both sides; held-out data of its own replaces the recipe's share.

    Raises `DataError` as `read_rows` and `split_rows` do.
    """
    settings: dict[str, Any] = {
        "data_format": recipe.data_format,
        "columns": recipe.column_names(),
    }
    rows = read_rows(data, **settings)
    if held_out_data:
        return SplitRows(rows, read_rows(held_out_data, **settings))
    return SplitRows(*split_rows(rows, recipe.held_out, recipe.seed))


def make_examples(task: Task[Any], rows: SplitRows, recipe: FinetuneRecipe, limit: int) -> Examples:
    """Turn the rows of both sides into examples of at most `limit` tokens.

    Raises:
        DataError: a row that is not of the task's shape, named by its place, or none left to
            train on.
    """
    made: dict[str, list[Example]] = {}
    counts: dict[str, int] = {}
    notes: list[str] = []
    for side, part in (("train", rows.train), ("held_out", rows.held_out)):
        lengths = Lengths(limit, recipe.overlong)
        examples = [_example(task, row, lengths) for row in part]
        made[side] = [example for example in examples if example is not None]
        if side == "train":  # nothing can be learned from an answer that was cut off
            useful = [example for example in made[side] if task.units(example)]
            lengths.num_dropped += len(made[side]) - len(useful)
            made[side] = useful
        counts |= {
            f"{side}_rows": len(made[side]),
            f"{side}_truncated": lengths.num_truncated,
            f"{side}_dropped": lengths.num_dropped,
        }
        if lengths.describe():
            notes.append(f"{side.replace('_', ' ')}: {lengths.describe()}")
    if not made["train"]:
        raise DataError(
            f"no row is left to train on: all {len(rows.train)} were longer than {limit} tokens"
        )
    return Examples(made["train"], made["held_out"], notes, counts)


def _example(task: Task[Any], row: Row, lengths: Lengths) -> Example | None:
    try:
        return task.example(row, lengths)
    except RequestError as error:  # a text that the tokenizer cannot take
        raise DataError(f"{row.place}: {error}") from error
