"""The recipe of a training run: every choice that determines its weights, in one object.

A recipe comes from its defaults, a TOML file (`--recipe`) and options, the later over the earlier.
It is written into the run folder; a run is resumed only under the recipe that began it.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from llmserve.config import ModelConfig
from llmserve.errors import ConfigError

__all__ = ["TrainingRecipe", "check_type", "field_docs", "load_recipe", "read_toml", "recipe_names"]

_RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRecipe:
    """Text preparation, model, optimization and bookkeeping of one run.

    Raises `ConfigError` for a value outside its range or a shape that makes no model.
    """

    tokenizer: str = "bpe"
    """bpe, word or char: trained on the text; or a folder whose tokenizer is used."""
    vocab_size: int = 2048
    """Most entries of the vocabulary; a character tokenizer may need fewer."""
    separator: str = ""
    """Text between two documents of one file; empty: files are cut at empty lines into blocks."""
    held_out: float = 0.05
    """Share of the text that is never trained on, for evaluation. Above 0, at most 0.5."""
    held_out_by: Literal["document", "tail"] = "document"
    """Hold out documents picked by their hash, or the end of the whole text."""
    positions: Literal["rope", "learned", "sinusoidal", "none"] = "rope"
    """How a token's place reaches the model."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalization."""
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    """Feed-forward."""
    bias: bool = False
    """Biases on every projection, as GPT-2 has them."""
    hidden_size: int = 256
    """Width of the residual stream."""
    num_layers: int = 4
    """Blocks of attention and feed-forward."""
    num_heads: int = 4
    """Query heads; divides hidden_size."""
    num_kv_heads: int = 2
    """Key and value heads; divides num_heads."""
    intermediate_size: int = 688
    """Width inside the feed-forward."""
    max_seq_len: int = 256
    """Tokens of context, in training and after."""
    tie_word_embeddings: bool = True
    """Whether the output layer shares the embedding's weights."""
    dropout: float = 0.0
    """Share of activations dropped in training. 0 or more, below 1."""
    steps: int | None = None
    """Optimizer steps; give this or minutes."""
    minutes: float | None = None
    """Wall-clock minutes for training; the first steps are timed and the rest planned by them."""
    max_passes: float | None = None
    """Most passes over the text that are planned for minutes, however fast the machine; none given:
    no limit."""
    batch_size: int = 16
    """Windows of max_seq_len tokens in one optimizer step."""
    accumulation: int = 1
    """Parts that a batch is computed in, one after the other; divides batch_size."""
    learning_rate: float = 1.5e-3
    """Highest learning rate, reached after the warm-up."""
    final_learning_rate: float = 1e-4
    """Learning rate at the last step, at the end of the cosine."""
    warmup_steps: int = 100
    """Steps of linear rise from zero."""
    weight_decay: float = 0.1
    """AdamW's decay, on matrices only."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; it is scaled down to this."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix products; auto: bfloat16 where the processor has instructions for it."""
    threads: int | None = None
    """Threads that share a step; none given: one for each core. Sums, so weights, depend on it."""
    seed: int = 0
    """Seed of initial weights, dropout, order of the text and choice of held-out documents."""
    evaluate_every: int = 100
    """Steps between evaluations on held-out text."""
    evaluation_tokens: int = 16_384
    """Most held-out tokens of an evaluation on the way; the last one takes them all."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept, beside the best one."""
    max_skipped_steps: int = 5
    """Steps in a row that may be skipped for a loss or gradient that is not finite."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            check_type(field.name, getattr(self, field.name), hints[field.name])
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{name} must be from {low} to {high}, got {value!r}")
        if self.batch_size % self.accumulation:
            raise ConfigError(
                f"accumulation ({self.accumulation}) must divide batch_size ({self.batch_size})"
            )
        if self.num_heads < 1 or self.hidden_size % self.num_heads:
            raise ConfigError(
                f"num_heads ({self.num_heads}) must divide hidden_size ({self.hidden_size})"
            )
        if self.final_learning_rate > self.learning_rate:
            raise ConfigError(
                f"final_learning_rate ({self.final_learning_rate}) must be at most "
                f"learning_rate ({self.learning_rate})"
            )
        if (self.steps is None) == (self.minutes is None):
            raise ConfigError("give either steps or minutes, to say how long to train")
        if self.steps is not None and self.max_passes is not None:
            raise ConfigError(
                "max_passes bounds what minutes plan; leave it out where steps are given"
            )

        self.model_config(vocab_size=self.vocab_size)

    def model_config(self, *, vocab_size: int, **special_ids: Any) -> ModelConfig:
        """The model over a vocabulary. Raises `ConfigError` where the shape makes no model."""
        return ModelConfig(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.hidden_size // self.num_heads,
            intermediate_size=self.intermediate_size,
            max_seq_len=self.max_seq_len,
            positions=self.positions,
            norm=self.norm,
            activation=self.activation,
            attention_bias=self.bias,
            attention_output_bias=self.bias,
            mlp_bias=self.bias,
            tie_word_embeddings=self.tie_word_embeddings,
            **special_ids,
        )

    @property
    def sha256(self) -> str:
        """Digest of all fields."""
        text = json.dumps(asdict(self), sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def micro_batch_size(self) -> int:
        """Windows computed at once."""
        return self.batch_size // self.accumulation


_RANGES: dict[str, tuple[float, float]] = {
    "vocab_size": (2, 1 << 20),
    "held_out": (1e-4, 0.5),
    "max_seq_len": (2, 1 << 20),
    "dropout": (0.0, 0.99),
    "steps": (1, 10**9),
    "minutes": (0.01, 10**6),
    "max_passes": (0.001, 10**6),
    "batch_size": (1, 1 << 20),
    "accumulation": (1, 1 << 20),
    "learning_rate": (1e-9, 10.0),
    "final_learning_rate": (0.0, 10.0),
    "warmup_steps": (0, 10**9),
    "weight_decay": (0.0, 10.0),
    "beta1": (0.0, 0.9999),
    "beta2": (0.0, 0.99999),
    "clip_norm": (1e-6, 1e6),
    "threads": (1, 4096),
    "seed": (0, 2**63 - 1),
    "evaluate_every": (1, 10**9),
    "evaluation_tokens": (1, 10**12),
    "checkpoint_every": (1, 10**9),
    "keep_checkpoints": (1, 10**6),
    "max_skipped_steps": (0, 10**6),
}


def load_recipe(source: str | None, overrides: Mapping[str, Any]) -> TrainingRecipe:
    """The recipe called `source` or in the TOML file at `source`, with `overrides` over it.

    An override of `steps` replaces `minutes` of the file, and the other way round.

    Raises:
        ConfigError: no such recipe, a file that is no TOML, an unknown key or a bad value.
    """
    values = {} if source is None else read_toml(_recipe_path(source))
    known = {field.name for field in fields(TrainingRecipe)}
    for name, given in ((source, values), ("options", overrides)):
        unknown = sorted(given.keys() - known)
        if unknown:
            raise ConfigError(f"{name}: unknown settings {unknown}; known: {sorted(known)}")
    for one, other in (("steps", "minutes"), ("minutes", "steps")):
        if one in overrides and other not in overrides:
            values.pop(other, None)
    if "steps" in overrides:
        values.pop("max_passes", None)
    return TrainingRecipe(**{**values, **overrides})


def recipe_names() -> list[str]:
    """Names of the recipes that come with the program."""
    return sorted(path.stem for path in _RECIPES.glob("*.toml"))


@cache
def field_docs(recipe: type = TrainingRecipe) -> dict[str, str]:
    """What stands beneath each field of a class of recipes: the help of its option."""
    body = ast.parse(inspect.getsource(recipe)).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(statement.target, ast.Name)
            docs[statement.target.id] = ast.literal_eval(following.value)
    return docs


def _recipe_path(source: str) -> Path:
    own = _RECIPES / f"{source}.toml"
    path = own if own.is_file() else Path(source)
    if not path.is_file():
        raise ConfigError(
            f"no recipe {source!r}: neither a TOML file nor one of {', '.join(recipe_names())}"
        )
    return path


def read_toml(path: Path) -> dict[str, Any]:
    """What the TOML file at `path` says. Raises `ConfigError` if it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: no TOML file that can be read: {error}") from error


def check_type(name: str, value: object, hint: Any) -> None:
    """Refuse a value of another type than the field's; a whole number will do for a float."""
    options = get_args(hint)
    if any(isinstance(option, str) for option in options):
        if value not in options:
            raise ConfigError(f"{name} must be one of {', '.join(options)}, got {value!r}")
        return
    allowed = options or (hint,)
    if float in allowed:
        allowed = (*allowed, int)
    if isinstance(value, bool) != (bool in allowed) or not isinstance(value, allowed):
        raise ConfigError(f"{name} must be {allowed[0].__name__}, got {value!r}")
