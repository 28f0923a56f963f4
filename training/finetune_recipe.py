"""The recipe of a fine-tuning: every choice beside model and data that determines its weights.

As in pre-training it comes from defaults, a TOML file (`--recipe`) and options, the later over the
earlier, is written into the run's folder, and a run is resumed only under the recipe that began it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmserve.assignments import parse_assignments
from llmserve.errors import ConfigError

from .recipe_fields import DeviceName, check_fields, check_known, fields_sha256, read_toml

__all__ = ["PROJECTIONS", "TASKS", "FinetuneRecipe", "load_finetune_recipe"]

TaskName = Literal["text", "instruct", "classify", "span", "embed", "reward", "dpo", "distill"]
TASKS: dict[TaskName, str] = {
    "text": "go on with documents: loss on every token",
    "instruct": "chats and instructions: loss on the assistant's words alone",
    "classify": "a label for a text: classification head",
    "span": "where in a text the answer to a question stands: span head",
    "embed": "texts that belong together lie together: embedding head, in-batch negatives",
    "reward": "which of two answers is better: reward head, Bradley-Terry",
    "dpo": "which of two answers is better: the model itself (direct preference optimization)",
    "distill": "a larger model's distribution over every next token",
}
"""What can be learned, each with a line about it."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Layers that LoRA can adapt."""

_OF_TASKS: dict[str, tuple[str, ...]] = {
    "labels": ("classify",),
    "temperature": ("embed", "distill"),
    "beta": ("dpo",),
    "teacher": ("distill",),
    "cross_entropy": ("distill",),
    "chat_template": ("instruct", "reward", "dpo", "distill"),
}
_OF_LORA = ("rank", "alpha", "targets")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneRecipe:
    """Task, method, optimization and bookkeeping of one fine-tuning.

    Raises `ConfigError` for a value outside its range, or one that its task or method has no use
    for.
    """

    task: TaskName = "instruct"
    """What is learned."""
    method: Literal["full", "lora", "qlora"] = "full"
    """All weights; low-rank matrices beside them; or those beside weights kept in 4 bits (nf4)."""
    rank: int | None = None
    """LoRA: width between the two matrices (none given: 8)."""
    alpha: float | None = None
    """LoRA: what they give is multiplied by alpha / rank (none given: twice the rank)."""
    targets: str = ""
    """LoRA: projections to adapt, with commas between; empty: all that the model has."""
    data_format: Literal["auto", "jsonl", "json", "csv", "tsv"] = "auto"
    """Format of the data; auto: as the file's name ends."""
    columns: str = ""
    """Other names of fields in the data, as text=SMS,label=Label."""
    held_out: float = 0.1
    """Share of the rows that is never trained on, where no held-out data is given. 0..0.5."""
    max_tokens: int | None = None
    """Most tokens of a row (none given: the model's context)."""
    overlong: Literal["truncate", "drop", "refuse"] = "truncate"
    """Longer rows: cut at their end, left out, or an error. What was done is counted."""
    epochs: float = 3.0
    """Passes over the rows, where no steps are given."""
    steps: int | None = None
    """Optimizer steps (none given: as epochs says)."""
    batch_size: int = 16
    """Rows in one optimizer step."""
    accumulation: int = 1
    """Parts that a batch is computed in, one after the other; divides batch_size."""
    learning_rate: float | None = None
    """Highest learning rate (none given: 3e-4 for all weights, 2e-3 for LoRA)."""
    warmup: float = 0.06
    """Share of the steps in which the rate rises; it then falls to a tenth as half a cosine."""
    weight_decay: float = 0.01
    """AdamW's decay, on matrices only."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; it is scaled down to this."""
    dropout: float = 0.0
    """Share of activations dropped in training. 0 or more, below 1."""
    labels: str = ""
    """classify: the labels in their order, with commas between; empty: those found in the data."""
    temperature: float | None = None
    """embed: what similarities are divided by (none given: 0.05); distill: what both models' logits
    are divided by (none given: 2)."""
    beta: float | None = None
    """dpo: how much the model is held to what it was before (none given: 0.1)."""
    teacher: str = ""
    """distill: folder of the larger model."""
    cross_entropy: float | None = None
    """distill: share of the loss that is cross-entropy with the text (none given: 0.5)."""
    chat_template: str = ""
    """Chats: file with a template in place of the model's own."""
    device: DeviceName = "cpu"
    """cpu; or cuda: an NVIDIA GPU."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix products; auto: bfloat16 where the processor has instructions for it."""
    threads: int | None = None
    """Threads that share a step; none given: one for each core. Sums, so weights, depend on it."""
    seed: int = 0
    """Seed of new weights, dropout, order of the rows and choice of held-out ones."""
    keep: Literal["best", "last"] = "best"
    """Weights of the finished model: those with the lowest held-out loss, or the last ones."""
    evaluate_every: int | None = None
    """Steps between evaluations on held-out rows (none given: one pass)."""
    checkpoint_every: int = 100
    """Steps between checkpoints; after each evaluation there is one too."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept, beside the best one."""
    max_skipped_steps: int = 5
    """Steps in a row that may be skipped for a loss or gradient that is not finite."""

    def __post_init__(self) -> None:
        check_fields(self, _RANGES)
        self._check_use()
        self.target_names()
        self.column_names()

    def _check_use(self) -> None:
        """Refuse what has no effect."""
        given = [name for name in (*_OF_TASKS, *_OF_LORA) if getattr(self, name) not in (None, "")]
        for name in given:
            tasks = _OF_TASKS.get(name)
            if tasks is not None and self.task not in tasks:
                raise ConfigError(f"{name} is for the task {' or '.join(tasks)}, not {self.task}")
            if name in _OF_LORA and self.method == "full":
                raise ConfigError(f"{name} is for the method lora or qlora, not full")
        if self.task == "distill" and not self.teacher:
            raise ConfigError("distill needs a teacher: the folder of the larger model")

    def target_names(self) -> tuple[str, ...]:
        """Projections that LoRA adapts. Raises `ConfigError` for an unknown one."""
        names = tuple(filter(None, (name.strip() for name in self.targets.split(","))))
        unknown = [name for name in names if name not in PROJECTIONS]
        if unknown:
            raise ConfigError(f"targets: unknown {unknown}; known: {', '.join(PROJECTIONS)}")
        return names or PROJECTIONS

    def label_names(self) -> tuple[str, ...]:
        """The labels given; none: those of the data."""
        return tuple(filter(None, (name.strip() for name in self.labels.split(","))))

    def column_names(self) -> dict[str, str]:
        """Our name of a field → the data's. Raises `ConfigError` if `columns` is malformed."""
        return parse_assignments([part for part in self.columns.split(",") if part], "columns")

    @property
    def lora_rank(self) -> int:
        """Width between LoRA's two matrices."""
        return 8 if self.rank is None else self.rank

    @property
    def lora_alpha(self) -> float:
        """Numerator of LoRA's scale."""
        return 2.0 * self.lora_rank if self.alpha is None else self.alpha

    @property
    def highest_rate(self) -> float:
        """The learning rate after the warm-up."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 3e-4 if self.method == "full" else 2e-3

    @property
    def micro_batch_size(self) -> int:
        """Rows computed at once."""
        return self.batch_size // self.accumulation

    @property
    def sha256(self) -> str:
        """Digest of all fields."""
        return fields_sha256(self)


_RANGES: dict[str, tuple[float, float]] = {
    "rank": (1, 4096),
    "alpha": (1e-6, 1e6),
    "held_out": (0.0, 0.5),
    "max_tokens": (2, 1 << 20),
    "epochs": (0.001, 10**6),
    "steps": (1, 10**9),
    "batch_size": (1, 1 << 20),
    "accumulation": (1, 1 << 20),
    "learning_rate": (1e-9, 10.0),
    "warmup": (0.0, 1.0),
    "weight_decay": (0.0, 10.0),
    "clip_norm": (1e-6, 1e6),
    "dropout": (0.0, 0.99),
    "temperature": (1e-3, 100.0),
    "beta": (1e-4, 100.0),
    "cross_entropy": (0.0, 1.0),
    "threads": (1, 4096),
    "seed": (0, 2**63 - 1),
    "evaluate_every": (1, 10**9),
    "checkpoint_every": (1, 10**9),
    "keep_checkpoints": (1, 10**6),
    "max_skipped_steps": (0, 10**6),
}


def load_finetune_recipe(path: Path | None, overrides: Mapping[str, Any]) -> FinetuneRecipe:
    """The recipe in the TOML file at `path`, with `overrides` over it.

    Raises:
        ConfigError: a file that is no TOML, an unknown key or a bad value.
    """
    values = {} if path is None else read_toml(path)
    check_known(FinetuneRecipe, path, values)
    return FinetuneRecipe(**{**values, **overrides})
